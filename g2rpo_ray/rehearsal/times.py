"""Durations of the parts of a run, each on its device: the input of the simulation."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from g2rpo_ray.config import Config
from g2rpo_ray.rollout.cost import prompt_cost
from g2rpo_ray.rollout.plan import BACKWARD, possible_trees

BySize = Mapping[int, float]
"""Seconds of a batch by its size, ascending: interpolated linearly, and proportional to the size outside the table."""


@dataclass(frozen=True, slots=True)
class Times:
    """Durations in seconds."""

    evaluations: BySize  # of a velocity evaluation, by the number of latents
    decodings: BySize  # of a VAE pass, by the number of images
    states: BySize  # of a learner's micro-batch: forward, backward and the objective's other evaluations
    completions: BySize | None = None  # of an evaluation by `rollout.completions`, where it differs
    scores: Mapping[str, float] = field(default_factory=dict)  # of an image, by the reward whose servers score it
    unit: float = 0.0  # of a unit, without its evaluations and decodings
    step: float = 0.0  # of an optimizer step, without its states
    publish: float = 0.0  # to publish new weights
    receive: float = 0.0  # for an actor to load new weights
    call: float = 0.0  # CPU time of a call to an actor, in the driver and in Ray: the driver makes one at a time
    cores: float = math.inf  # number of cores that all actors share; infinity: each actor has its own device

    def scaled(self, factor: float) -> "Times":
        """All durations times `factor`, except `cores`."""
        scores = {name: factor * seconds for name, seconds in self.scores.items()}
        return replace(self.shared(factor, factor), scores=scores, call=factor * self.call)

    def shared(self, rollout: float, learner: float) -> "Times":
        """Durations of rollout actors and of the learner times these factors, for actors that share a device."""
        factors = {"evaluations": rollout, "decodings": rollout, "completions": rollout, "states": learner}
        tables: dict[str, Any] = {
            name: {size: factor * seconds for size, seconds in table.items()}
            for name, factor in factors.items()
            if (table := getattr(self, name)) is not None
        }
        numbers: dict[str, Any] = {name: rollout * getattr(self, name) for name in ("unit", "receive")}
        numbers |= {name: learner * getattr(self, name) for name in ("step", "publish")}
        return replace(self, **tables, **numbers)


def of_batch(table: BySize, size: int) -> float:
    """Seconds of a batch of `size`."""
    least, most = min(table), max(table)
    if size > most:
        return table[most] * size / most
    return float(np.interp(size, list(table), list(table.values()))) if size >= least else table[least] * size / least


def total(table: BySize, sizes: Iterable[int]) -> float:
    """Seconds of consecutive batches of these sizes."""
    return sum(number * of_batch(table, size) for size, number in Counter(sizes).items())


def pieces(number: int, size: int) -> list[int]:
    """Sizes of the batches when `number` items are split into batches of at most `size`."""
    return [size] * (number // size) + [number % size] * (number % size > 0)


def operations(config: Config) -> Times:
    """Numbers of floating-point operations by PyTorch's count, in 10^12: seconds on a device of 1 TFLOP/s.

    The model's configuration files must be on this machine. `auto` counts as its costliest choice, rewards as 0.
    """
    from g2rpo_ray.models.estimate import count_operations

    counted, learner = count_operations(config), config.learner
    mean = prompt_cost(config, possible_trees(config, config.sampler.costliest))
    states, checkpointed = config.velocity_cost * mean.states, learner.gradient_checkpointing
    others = mean.update - (BACKWARD + checkpointed) * states  # evaluations without a gradient
    update = states * counted.state(checkpointed) + others * counted.evaluation
    each = update * (1 + sum(parts - 1 for parts in learner.subpaths)) / mean.states
    return Times({1: counted.evaluation}, {1: counted.decoding}, {1: each})
