"""From prompts to scored rollouts: what is asked of which pool, and what waits for what.

    prompt ─► anchor ─┬─► branch units, a branch step and a slice of members each ─► images ─► scores ─► PromptRollout
                      └─► image ─► scores: the on-policy evaluation

Tensors stay in the object store: this process holds references, reports and scores.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from actors.encoder import Embeddings
from actors.pool import Pool
from actors.reward import Scorer
from actors.weights import PublishedWeights
from g2rpo_ray.config import Config
from g2rpo_ray.plan import branch_plan
from g2rpo_ray.types import (
    AnchorUnit,
    BranchUnit,
    FloatArray,
    PromptRollout,
    Rollout,
    Samples,
    SampleUnit,
    Unit,
    UnitReport,
)


class Collector:
    """Plans the units of an iteration, sends them to the pools and puts together what comes back."""

    def __init__(
        self,
        config: Config,
        embeddings: Embeddings,
        rollout: Pool,
        scorers: Mapping[str, Scorer],
        credits: asyncio.Semaphore,
    ):
        self._config = config
        self._plan = branch_plan(config.sampler)
        self._embeddings = embeddings
        self._rollout = rollout
        self._scorers = scorers
        self._credits = credits
        self.units_done = 0

    async def rollout(self, iteration: int, prompts: Sequence[str], weights: PublishedWeights) -> Rollout:
        """Sample and score the group of every prompt at every branch step and granularity."""
        start = time.perf_counter()
        call = _Call(weights, [])
        embeddings = self._embeddings.refs(prompts)
        results = await asyncio.gather(
            *(
                self._prompt(call, AnchorUnit(iteration, slot, prompt), embedding)
                for slot, (prompt, embedding) in enumerate(zip(prompts, embeddings, strict=True))
            )
        )
        assert sum(report.evaluations for report in call.reports) == len(prompts) * self._plan.evaluations
        scores = {name: np.concatenate([anchor[name] for _, anchor in results]) for name in self._scorers}
        now = time.perf_counter()
        return Rollout([rollout for rollout, _ in results], scores, call.reports, now - start, call.last_image - start)

    async def samples(self, prompts: Sequence[str], weights: PublishedWeights) -> Samples:
        """Sample every prompt with each evaluation seed and score the images with every reward."""
        call = _Call(weights, [])
        embeddings = self._embeddings.refs(prompts)
        units = [SampleUnit(prompt, tuple(range(self._config.evaluation.seeds))) for prompt in prompts]
        results = await asyncio.gather(
            *(self._sample(call, unit, ref) for unit, ref in zip(units, embeddings, strict=True))
        )
        scores = {name: np.stack([by_reward[name] for _, by_reward in results]) for name in self._scorers}
        shown = [(await images)[0] for images, _ in results[: self._config.evaluation.grid_prompts]]
        return Samples(list(prompts), scores, shown, sum(report.evaluations for report in call.reports))

    async def _prompt(self, call: "_Call", unit: AnchorUnit, embedding: ray.ObjectRef) -> tuple[PromptRollout, Any]:
        anchor, image = await self._compute(call, unit, embedding, cost=self._plan.steps)
        scores, *branches = await asyncio.gather(
            self._score(image, 1, unit.prompt, list(self._scorers)),
            *(self._branch(call, branch, embedding, anchor) for branch in self._branch_units(unit)),
        )
        slices = len(branches) // len(self._plan.branch_steps)
        by_step = [branches[at : at + slices] for at in range(0, len(branches), slices)]
        rewards = np.stack([np.concatenate([r for _, r in step], axis=-1) for step in by_step], axis=1)  # [R, M, J, G]
        refs = tuple(tuple(ref for ref, _ in step) for step in by_step)
        return PromptRollout(unit.slot, unit.prompt, rewards, embedding, anchor, refs), scores

    def _branch_units(self, anchor: AnchorUnit) -> list[BranchUnit]:
        group = self._config.sampler.group_size
        size = self._config.rollout.members_per_unit or group
        return [
            BranchUnit(anchor.iteration, anchor.slot, anchor.prompt, step, first, min(size, group - first))
            for step in self._plan.branch_steps
            for first in range(0, group, size)
        ]

    async def _branch(
        self, call: "_Call", unit: BranchUnit, embedding: ray.ObjectRef, anchor: ray.ObjectRef
    ) -> tuple[ray.ObjectRef, FloatArray]:
        """The transitions, and the scores [R, J, G'] of the images."""
        cost = unit.members * self._plan.branch_evaluations(unit.branch_step)
        branches, images = await self._compute(call, unit, embedding, anchor, cost=cost)
        shape = (len(self._plan.strides), unit.members)
        scores = await self._score(images, shape[0] * shape[1], unit.prompt, list(self._config.rewards))
        return branches, np.stack([scores[name].reshape(shape) for name in self._config.rewards])

    async def _sample(
        self, call: "_Call", unit: SampleUnit, embedding: ray.ObjectRef
    ) -> tuple[ray.ObjectRef, dict[str, FloatArray]]:
        _, images = await self._compute(call, unit, embedding, cost=len(unit.seeds) * self._plan.steps)
        return images, await self._score(images, len(unit.seeds), unit.prompt, list(self._scorers))

    async def _compute(self, call: "_Call", unit: Unit, *args: Any, cost: int) -> list[ray.ObjectRef]:
        """The unit's result and images; anchors first, since branches wait for them, then the dearest first."""
        urgency = (0, 0) if isinstance(unit, AnchorUnit) else (1, -cost)
        refs, report = await self._rollout.call("compute", unit, call.weights, *args, priority=urgency, returns=3)
        assert report.evaluations == cost, f"{unit.name}: {report.evaluations} evaluations, {cost} planned"
        call.reports.append(report)
        call.last_image = time.perf_counter()
        self.units_done += 1
        return refs

    async def _score(self, images: ray.ObjectRef, count: int, prompt: str, names: list[str]) -> dict[str, FloatArray]:
        """Scores [count] by reward; with them the images are used up, and the unit's credit is free again."""
        try:
            scores = await asyncio.gather(*(self._scorers[name].score(images, count, prompt) for name in names))
        finally:
            self._credits.release()
        return dict(zip(names, scores, strict=True))


@dataclass(slots=True)
class _Call:
    """What the units of one rollout share."""

    weights: PublishedWeights
    reports: list[UnitReport]
    last_image: float = 0.0
