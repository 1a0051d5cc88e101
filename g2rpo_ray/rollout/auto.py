"""What `auto` has chosen, and why: a function of the settings and of what the run's own probes measured. No Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from g2rpo_ray.algo.alignment import (
    Alignment,
    best_steps,
    coarsest_that_holds,
    cosines,
    of_all_steps,
    progress,
    standard_error,
)
from g2rpo_ray.algo.completion import Choice
from g2rpo_ray.algo.credit import Floats
from g2rpo_ray.algo.tree import plan_tree
from g2rpo_ray.config import Config
from g2rpo_ray.rollout.plan import BACKWARD

RULE = "alignment"  # by which `auto` chooses: no setting, but what another one has chosen is another choice

Estimate = tuple[float, float]
"""A value and its standard error."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What probes tell."""

    prompts: int
    by_stride: dict[int, Estimate]
    """Progress for an evaluation by completions of each stride (0: of all that are given), from all steps."""
    by_step: dict[int, Estimate]
    """The same of each branch step, by the completions that are chosen or given."""
    alignment: dict[int, Estimate]
    """Cosine of the expected gradients by completions of each stride and of the finest."""
    coherence: dict[int, Estimate]
    """E⟨g_λ(i), g_λ(j)⟩ over E|g_λ|² of each step, by these completions: signal over noise of a prompt."""
    noise_scale: Estimate
    """Prompts at which signal equals noise, over all steps (McCandlish et al. 2018, arXiv 1812.06162)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice, since an iteration."""

    since: int
    choice: Choice
    measured: Measured
    """What it follows from."""


DECISIONS = TypeAdapter(list[Decision])


class Budget:
    """The choices of a run. An iteration's follows from the probes that were done when it began to be sampled.

    With `rollout.max_staleness` an iteration is sampled while the one before it updates, and so the choice of iteration
    k follows from probes up to k − 1 − max_staleness: what is known then, on any number of actors, and after a resume.
    """

    def __init__(self, config: Config, saved: Mapping[str, Any] | None = None) -> None:
        """`saved`: what `state` was; nothing of it is used where there are other granularities or steps to choose."""
        self._config, self._sampler = config, config.sampler
        self._bounds = [list(self._sampler.all_strides), list(self._sampler.all_branch_steps)]
        alike = {"bounds": self._bounds, "rule": RULE}
        known = saved and self._sampler.is_auto and {name: saved.get(name) for name in alike} == alike
        self._decisions = DECISIONS.validate_python(saved["decisions"]) if saved and known else []

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON has it."""
        decisions = DECISIONS.dump_python(self._decisions, mode="json")
        return {"bounds": self._bounds, "rule": RULE, "decisions": decisions}

    def choice(self, iteration: int) -> Choice | None:
        """What is in the place of `auto` in an iteration; None where nothing is `auto`."""
        if not self._sampler.is_auto:
            return None
        made = [decision.choice for decision in self._decisions if decision.since <= iteration]
        return made[-1] if made else self._sampler.cheapest

    def learn(self, iteration: int, alignment: Alignment | None) -> Decision | None:
        """What follows from an iteration that is done, if it probed: `alignment` is what its update found then."""
        if alignment is None:
            return None
        choice, measured = decide(self._config, alignment)
        decision = Decision(iteration + 1 + self._config.rollout.max_staleness, choice, measured)
        self._decisions = [*self._decisions[-2:], decision]  # those before may hold for some iterations more
        return decision

    def metrics(self, iteration: int, decision: Decision | None) -> dict[str, float]:
        """`choice/*` of an iteration: what it had. Where it probed, what the next choice follows from: `probe/*`."""
        choice = self.choice(iteration)
        if choice is None:
            return {}
        named: dict[str, float] = {}
        if self._sampler.strides == "auto":
            named["choice/stride"] = choice.strides[0]
        if self._sampler.branch_steps == "auto":
            named |= {f"choice/step/{s}": float(s in choice.branch_steps) for s in self._sampler.all_branch_steps}
        return named | (_named(decision.measured) if decision else {})


def _named(measured: Measured) -> dict[str, float]:
    """`probe/*`: values, and their standard errors by `_se`."""
    tables = {
        "progress_stride": measured.by_stride, "progress_step": measured.by_step,
        "alignment": measured.alignment, "coherence": measured.coherence,
    }  # fmt: skip
    found = {f"{name}/{key}": value for name, table in tables.items() for key, value in table.items()}
    found["noise_scale"] = measured.noise_scale
    named: dict[str, float] = {"probe/prompts": measured.prompts}
    for name, (value, error) in found.items():
        named |= {f"probe/{name}": value, f"probe/{name}_se": error}
    return named


def decide(config: Config, found: Alignment) -> tuple[Choice, Measured]:
    """The choice that follows from what the gradients of probes tell.

    The coarsest granularity and the last branch steps, unless others are better beyond chance.
    """
    sampler, cost = config.sampler, evaluations(config, found)
    by_stride = of_all_steps(found, cost)
    place = len(found.strides) - 1
    if sampler.strides == "auto":
        place = coarsest_that_holds(by_stride)
    by_step = progress(found, cost)[:, :, place]
    steps = sampler.all_branch_steps
    if sampler.branch_steps == "auto":
        steps = tuple(found.steps[at] for at in best_steps(by_step, sampler.auto.steps))
    strides = (found.strides[place],) if sampler.strides == "auto" else sampler.all_strides
    signal, noise = found.with_itself[..., place], found.square[..., place]
    with np.errstate(invalid="ignore", divide="ignore"):
        coherence = signal / noise
        scale = noise.sum(1) / signal.sum(1) - 1
    measured = Measured(
        found.prompts,
        _estimates(found.strides, by_stride),
        _estimates(found.steps, by_step),
        _estimates(found.strides[1:], cosines(found)[:, 1:]),
        _estimates(found.steps, coherence),
        _estimates([0], scale[:, None])[0],
    )
    return Choice(strides, steps), measured


def evaluations(config: Config, found: Alignment) -> Floats:
    """[M, J]: what a step's branches take with each stride, completions and the learner's states together."""

    def cost(step: int, stride: int) -> int:
        strides = (stride,) if stride else config.sampler.all_strides
        alone = {"branch_steps": (step,), "strides": strides, "stochastic_edges": 1, "splits": (), "untrained": ()}
        tree = plan_tree(config.sampler.model_copy(update=alone).shape())
        return tree.completions + BACKWARD * len(np.unique(tree.source))

    return np.array([[cost(step, stride) for stride in found.strides] for step in found.steps], float)


def _estimates(keys: Sequence[int], values: Floats) -> dict[int, Estimate]:
    """Of values [n + 1, keys]."""
    pairs = zip(values[0].tolist(), standard_error(values).tolist(), strict=True)
    return dict(zip(keys, pairs, strict=True))


def decision_in_words(config: Config, decision: Decision) -> str:
    """The choice and its reason, in a line."""
    choice, measured = decision.choice, decision.measured
    parts = []
    if config.sampler.strides == "auto":
        parts.append(f"λ={choice.strides[0]}, progress for an evaluation: {_listed(measured.by_stride, 'λ=')}")
    if config.sampler.branch_steps == "auto":
        steps = ", ".join(map(str, choice.branch_steps))
        parts.append(f"branch steps {steps}, progress for an evaluation: {_listed(measured.by_step, '')}")
    prompts = f"auto, from iteration {decision.since + 1} on, by {measured.prompts} probed prompts: "
    return prompts + "; ".join(parts)


def _listed(found: Mapping[int, Estimate], sign: str) -> str:
    """Relative to the largest, each with its standard error."""
    most = max((value for value, _ in found.values()), default=0) or 1.0
    return ", ".join(f"{sign}{key} {value / most:.2f} ± {error / most:.2f}" for key, (value, error) in found.items())
