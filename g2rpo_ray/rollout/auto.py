"""The choices of `auto`: a function of the settings and the run's own probes. No Ray."""

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

RULE = "alignment"  # name of the present rule of `auto`; choices of another rule are not resumed

Estimate = tuple[float, float]
"""A value and its standard error."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of probes."""

    prompts: int
    by_stride: dict[int, Estimate]
    """Progress per evaluation with completions of each stride (0: all given strides), over all steps."""
    by_step: dict[int, Estimate]
    """Progress per evaluation of each branch step, with the chosen or given strides."""
    alignment: dict[int, Estimate]
    """Cosine of the expected gradients with each stride and with the finest."""
    coherence: dict[int, Estimate]
    """E⟨g_λ(i), g_λ(j)⟩ over E|g_λ|² of each step, with these strides: signal over noise of a prompt."""
    noise_scale: Estimate
    """Number of prompts at which signal equals noise, over all steps (McCandlish et al. 2018, arXiv 1812.06162)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice, valid from iteration `since` on."""

    since: int
    choice: Choice
    measured: Measured
    """The measurements that it is based on."""


DECISIONS = TypeAdapter(list[Decision])


class Budget:
    """The choices of a run: by `auto`, or finer completions after declines (`evaluation.on_decline`).

    The choice of iteration k is based on probes and evaluations up to iteration k − 1 − max_staleness. These are
    finished when its sampling starts, with any number of actors and after a resume.
    """

    def __init__(self, config: Config, saved: Mapping[str, Any] | None = None) -> None:
        """`saved` is an earlier `state`; it is ignored if it has other granularities, steps or another rule."""
        self._config, self._sampler = config, config.sampler
        self._bounds = [list(self._sampler.all_strides), list(self._sampler.all_branch_steps)]
        alike = {"bounds": self._bounds, "rule": RULE}
        known = saved and self._sampler.is_auto and {name: saved.get(name) for name in alike} == alike
        self._decisions = DECISIONS.validate_python(saved["decisions"]) if saved and known else []
        answered = saved and config.evaluation.on_decline != "continue"
        self.declines: list[int] = list(saved.get("declines", [])) if saved and answered else []
        """Numbers of iterations after which a decline made completions finer."""

    @property
    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, of JSON types."""
        decisions = DECISIONS.dump_python(self._decisions, mode="json")
        return {"bounds": self._bounds, "rule": RULE, "decisions": decisions, "declines": self.declines}

    def choice(self, iteration: int) -> Choice | None:
        """The choice for an iteration; None if it has all that the settings say."""
        if not self._sampler.is_auto:
            before = [done for done in self.declines if done + self._config.rollout.max_staleness <= iteration]
            return self._finer(len(before)) if before else None
        made = [decision.choice for decision in self._decisions if decision.since <= iteration]
        return made[-1] if made else self._sampler.cheapest

    def learn(self, iteration: int, alignment: Alignment | None) -> Decision | None:
        """The decision after a finished iteration with the `alignment` of its update; None if it did not probe."""
        if alignment is None:
            return None
        choice, measured = decide(self._config, alignment)
        decision = Decision(iteration + 1 + self._config.rollout.max_staleness, choice, measured)
        self._decisions = [*self._decisions[-2:], decision]  # earlier ones may apply to some further iterations
        return decision

    def decline(self, done: int) -> int | None:
        """Halves the stride from the next iteration on, after `done` of them. Returns the new one; None if there is no
        finer one."""
        if self._finer(len(self.declines)).strides == (1,):
            return None
        self.declines.append(done)
        return self._finer(len(self.declines)).strides[0]

    def _finer(self, declines: int) -> Choice:
        return Choice((max(1, self._sampler.all_strides[0] >> declines),), self._sampler.all_branch_steps)

    def metrics(self, iteration: int, decision: Decision | None) -> dict[str, float]:
        """Metrics `choice/*` of an iteration, and `probe/*` of its decision, if it probed."""
        choice = self.choice(iteration)
        if choice is None:
            return {}
        named: dict[str, float] = {}
        if self._sampler.strides == "auto" or not self._sampler.is_auto:
            named["choice/stride"] = choice.strides[0]
        if self._sampler.branch_steps == "auto":
            named |= {f"choice/step/{s}": float(s in choice.branch_steps) for s in self._sampler.all_branch_steps}
        return named | (_named(decision.measured) if decision else {})


def _named(measured: Measured) -> dict[str, float]:
    """Metrics `probe/*`: values, and standard errors with the suffix `_se`."""
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
    """The choice by the gradients of probes, and the measurements.

    It is the coarsest granularity and the last branch steps, unless others are significantly better.
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
    """Cost [M steps, J strides] of a step's branches in evaluations: completions and learner states."""

    def cost(step: int, stride: int) -> int:
        strides = (stride,) if stride else config.sampler.all_strides
        alone = {"branch_steps": (step,), "strides": strides, "stochastic_edges": 1, "splits": (), "untrained": ()}
        tree = plan_tree(config.sampler.model_copy(update=alone).shape())
        return tree.completions + BACKWARD * len(np.unique(tree.source))

    return np.array([[cost(step, stride) for stride in found.strides] for step in found.steps], float)


def _estimates(keys: Sequence[int], values: Floats) -> dict[int, Estimate]:
    """Estimates from jackknife values [n + 1, keys]."""
    pairs = zip(values[0].tolist(), standard_error(values).tolist(), strict=True)
    return dict(zip(keys, pairs, strict=True))


def decision_in_words(config: Config, decision: Decision) -> str:
    """The choice and its reason, in one line."""
    choice, measured = decision.choice, decision.measured
    parts = []
    if config.sampler.strides == "auto":
        parts.append(f"λ={choice.strides[0]}, progress per evaluation: {_listed(measured.by_stride, 'λ=')}")
    if config.sampler.branch_steps == "auto":
        steps = ", ".join(map(str, choice.branch_steps))
        parts.append(f"branch steps {steps}, progress per evaluation: {_listed(measured.by_step, '')}")
    prompts = f"auto, from iteration {decision.since + 1} on, by {measured.prompts} probed prompts: "
    return prompts + "; ".join(parts)


def _listed(found: Mapping[int, Estimate], sign: str) -> str:
    """Values relative to the largest, each with its standard error."""
    most = max((value for value, _ in found.values()), default=0) or 1.0
    return ", ".join(f"{sign}{key} {value / most:.2f} ± {error / most:.2f}" for key, (value, error) in found.items())
