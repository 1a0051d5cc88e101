"""What `auto` has chosen, and why: a function of the settings and of what the run's own probes measured. No Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter

from g2rpo_ray.algo import Choice, Measured, Tree, agreeing, mattering, measure, pooled
from g2rpo_ray.config import Config
from g2rpo_ray.types import PromptRollout


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice, since an iteration."""

    since: int
    choice: Choice
    measured: Measured
    """What it follows from: this probe's and, half as much each, those before it."""


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
        known = saved and self._sampler.is_auto and saved["bounds"] == self._bounds
        self._decisions = DECISIONS.validate_python(saved["decisions"]) if saved and known else []

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON has it."""
        return {"bounds": self._bounds, "decisions": DECISIONS.dump_python(self._decisions, mode="json")}

    def choice(self, iteration: int) -> Choice | None:
        """What is in the place of `auto` in an iteration; None where nothing is `auto`."""
        if not self._sampler.is_auto:
            return None
        made = [decision.choice for decision in self._decisions if decision.since <= iteration]
        return made[-1] if made else self._sampler.first_choice

    def learn(self, iteration: int, prompts: Sequence[PromptRollout]) -> Decision | None:
        """What follows from an iteration that is done, if it probed."""
        probes = [
            (prompt.tree, torch.tensor(prompt.scores))
            for prompt in prompts
            if self._sampler.probes(iteration, prompt.slot)
        ]
        if not probes:
            return None
        before = self._decisions[-1].measured if self._decisions else None
        choice, measured = decide(self._config, before, probes)
        decision = Decision(iteration + 1 + self._config.rollout.max_staleness, choice, measured)
        self._decisions = [*self._decisions[-1:], decision]  # the one before may hold for an iteration more
        return decision

    def metrics(self, iteration: int, decision: Decision | None) -> dict[str, float]:
        """`choice/*` of an iteration: what it had, and, where it probed, what the next choice follows from."""
        choice = self.choice(iteration)
        if choice is None:
            return {}
        named: dict[str, float] = {}
        if self._sampler.strides == "auto":
            named["choice/stride"] = choice.strides[0]
        if self._sampler.branch_steps == "auto":
            named |= {f"choice/step/{s}": float(s in choice.branch_steps) for s in self._sampler.all_branch_steps}
        if decision:
            named |= {f"choice/agreement/{key}": value for key, value in decision.measured.agreement.items()}
            named |= {f"choice/spread/{key}": value for key, value in decision.measured.spread.items()}
        return named


def decide(
    config: Config, before: Measured | None, probes: Sequence[tuple[Tree, torch.Tensor]]
) -> tuple[Choice, Measured]:
    """The choice that follows from what was known and the probes of an iteration, (tree, scores [R, Q]) each."""
    sampler, weights = config.sampler, [reward.weight for reward in config.rewards.values()]
    measured = pooled(before, measure(probes, group=config.credit.group, weights=weights))
    steps = sampler.all_branch_steps
    if sampler.branch_steps == "auto":
        steps = mattering(measured.spread, sampler.auto.spread) or steps
        there = measure(probes, group=config.credit.group, weights=weights, steps=steps)  # agreement where it counts
        measured = Measured(pooled(before, there).agreement, measured.spread)
    strides = sampler.all_strides
    if sampler.strides == "auto":
        strides = (agreeing(measured.agreement, sampler.auto.agreement),)
    return Choice(strides, steps), measured


def in_words(config: Config, decision: Decision) -> str:
    """The choice and its reason, in a line."""
    auto, choice, measured = config.sampler.auto, decision.choice, decision.measured
    parts = []
    if config.sampler.strides == "auto":
        found = ", ".join(f"λ={stride} {value:.3f}" for stride, value in sorted(measured.agreement.items())) or "none"
        parts.append(f"λ={choice.strides[0]}, for agreement is {found} (wanted: {auto.agreement:g})")
    if config.sampler.branch_steps == "auto":
        found = ", ".join(f"{step}: {value:.2f}" for step, value in sorted(measured.spread.items())) or "none"
        steps = ", ".join(map(str, choice.branch_steps))
        parts.append(f"branch steps {steps}, for shares of the largest spread are {found} (wanted: {auto.spread:g})")
    return f"auto, from iteration {decision.since + 1} on: " + "; ".join(parts)
