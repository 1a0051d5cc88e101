"""How long the parts of a run take, each on its device: of all that a simulation adds up."""

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
"""Seconds of a batch by its size, ascending: linear between those that are known, in proportion beyond them."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    evaluations: BySize  # of a velocity, a batch of latents
    decodings: BySize  # of a pass of the VAE
    states: BySize  # of a learner's micro-batch, forward and backward, with whatever else the objective evaluates
    completions: BySize | None = None  # of a velocity by `rollout.completions`, where that is another one
    scores: Mapping[str, float] = field(default_factory=dict)  # of an image, by the reward whose servers score it
    unit: float = 0.0  # of a unit beside its evaluations and decodings
    step: float = 0.0  # of an optimizer step beside its states
    publish: float = 0.0
    receive: float = 0.0  # of an actor, new weights
    cores: float = math.inf  # that all actors share; infinity: each has a device of its own

    def scaled(self, factor: float) -> "Times":
        """All of them so many times as long."""
        scores = {name: factor * seconds for name, seconds in self.scores.items()}
        return replace(self.shared(factor, factor), scores=scores)

    def shared(self, rollout: float, learner: float) -> "Times":
        """Those of rollout actors and of the learner so many times as long, as where several share a device."""
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
    """Seconds of a batch of so many."""
    least, most = min(table), max(table)
    if size > most:
        return table[most] * size / most
    return float(np.interp(size, list(table), list(table.values()))) if size >= least else table[least] * size / least


def total(table: BySize, sizes: Iterable[int]) -> float:
    """Seconds of batches of these sizes, one after the other."""
    return sum(number * of_batch(table, size) for size, number in Counter(sizes).items())


def pieces(number: int, size: int) -> list[int]:
    """Sizes of the batches of at most `size` that so many make."""
    return [size] * (number // size) + [number % size] * (number % size > 0)


def operations(config: Config) -> Times:
    """Times in units of 10^12 floating-point operations by PyTorch's count: seconds on a device of 1 TFLOP/s.

    From the model's configuration files on this machine. `auto` has its costliest choice. Rewards take no time.
    """
    from g2rpo_ray.models.estimate import count_operations

    counted, learner = count_operations(config), config.learner
    mean = prompt_cost(config, possible_trees(config, config.sampler.costliest))
    states, checkpointed = config.velocity_cost * mean.states, learner.gradient_checkpointing
    others = mean.update - (BACKWARD + checkpointed) * states  # by policies without a gradient
    update = states * counted.state(checkpointed) + others * counted.evaluation
    each = update * (1 + sum(parts - 1 for parts in learner.subpaths)) / mean.states
    return Times({1: counted.evaluation}, {1: counted.decoding}, {1: each})
