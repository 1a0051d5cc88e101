"""From prompts to scored rollouts: what is asked of which pool, and what waits for what.

    prompt ─► anchor ─┬─► branch units, a branch step and a slice of members each ─► images ─► scores ─► PromptRollout
                      └─► image ─► scores: the on-policy evaluation

Tensors stay in the object store: this process holds references, reports and scores.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import ray

from actors.encoder import Embeddings
from actors.pool import Pool, is_lost_object
from actors.reward import Scorer
from actors.weights import PublishedWeights
from g2rpo_ray.config import Config
from g2rpo_ray.rollout.plan import branch_plan
from g2rpo_ray.types import (
    AnchorUnit,
    BranchUnit,
    FloatArray,
    PromptRollout,
    Rollout,
    Samples,
    SampleUnit,
    Span,
    Unit,
    UnitReport,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ATTEMPTS = 5  # at the work of a unit, and of a prompt; each is lost only with a node


@dataclass(slots=True)
class _Job:
    """What the units of one prompt share, and what they report."""

    weights: PublishedWeights
    iteration: int  # of the units, or the one that they come before
    embedding: ray.ObjectRef
    reports: list[UnitReport] = field(default_factory=list)
    last_image: float = 0.0


def _again_if_lost(work: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Coroutine[Any, Any, T]]:
    """Do work again if what it left in the object store went with its node; it comes out the same."""

    @functools.wraps(work)
    async def persistent(collector: "Collector", job: _Job, unit: Unit, *args: Any) -> T:
        for _ in range(MAX_ATTEMPTS - 1):
            attempt = _Job(job.weights, job.iteration, job.embedding)
            try:
                result = await work(collector, attempt, unit, *args)
            except ray.exceptions.RayError as error:
                if not is_lost_object(error):
                    raise
                logger.warning("%s: computed again, an object was lost (%s)", unit.name, type(error).__name__)
            else:
                job.reports += attempt.reports
                job.last_image = max(job.last_image, attempt.last_image)
                return result
        return await work(collector, job, unit, *args)

    return persistent


class Collector:
    """Plans the units of an iteration, sends them to the pools and puts together what comes back."""

    def __init__(
        self,
        config: Config,
        embeddings: Embeddings,
        rollout: Pool,
        scorers: Mapping[str, Scorer],
        keep: Callable[[ray.ObjectRef, bool], Awaitable[None]],
        timeline: list[Span],
    ):
        """
        Args:
            keep: has the learner fetch a unit's result, so that it outlives the node that computed it; at once, or
                together with what comes next.
            timeline: takes a span for everything that was done.
        """
        self._config = config
        self._plan = branch_plan(config.sampler)
        self._embeddings = embeddings
        self._rollout = rollout
        self._scorers = scorers
        self._keep = keep
        self._timeline = timeline
        self._computing = 0  # units asked for that are not done

    async def rollout(self, iteration: int, prompts: Sequence[str], weights: PublishedWeights) -> Rollout:
        """Sample and score the group of every prompt at every branch step and granularity."""
        start = time.perf_counter()
        units = [AnchorUnit(iteration, slot, prompt) for slot, prompt in enumerate(prompts)]
        jobs = [_Job(weights, iteration, ref) for ref in self._embeddings.refs(prompts)]
        done = await asyncio.gather(*(self._prompt(job, unit) for job, unit in zip(jobs, units, strict=True)))
        reports = [report for job in jobs for report in job.reports]
        assert sum(report.evaluations for report in reports) == len(prompts) * self._plan.evaluations
        scores = {name: np.concatenate([anchor[name] for _, anchor in done]) for name in self._scorers}
        sampled = max(job.last_image for job in jobs) - start
        seconds = time.perf_counter() - start
        return Rollout([rollout for rollout, _ in done], scores, reports, weights.manifest.version, seconds, sampled)

    async def samples(self, iteration: int, prompts: Sequence[str], weights: PublishedWeights) -> Samples:
        """Sample every prompt with each evaluation seed and score the images with every reward.

        `iteration` is the one before which that is due: its units come first.
        """
        units = [SampleUnit(prompt, tuple(range(self._config.evaluation.seeds))) for prompt in prompts]
        jobs = [_Job(weights, iteration, ref) for ref in self._embeddings.refs(prompts)]
        done = await asyncio.gather(*(self._sample(job, unit) for job, unit in zip(jobs, units, strict=True)))
        scores = {name: np.stack([by_reward[name] for _, by_reward in done]) for name in self._scorers}
        shown = [(await images)[0] for images, _ in done[: self._config.evaluation.grid_prompts]]
        return Samples(list(prompts), scores, shown, sum(r.evaluations for job in jobs for r in job.reports))

    async def sample(
        self, unit: SampleUnit, weights: PublishedWeights, embedding: ray.ObjectRef
    ) -> tuple[ray.ObjectRef, dict[str, FloatArray]]:
        """One unit's images [S, H, W, 3], by reference, and their scores [S] by reward."""
        return await self._sample(_Job(weights, 0, embedding), unit)

    @_again_if_lost
    async def _prompt(self, job: "_Job", unit: AnchorUnit) -> tuple[PromptRollout, dict[str, FloatArray]]:
        anchor, image = await self._compute(job, unit, cost=self._plan.steps)
        scores, _, *branches = await asyncio.gather(
            self._score(unit, image, 1, list(self._scorers)),
            self._keep(anchor, False),
            *(self._branch(job, branch, anchor) for branch in self._branch_units(unit)),
        )
        slices = len(branches) // len(self._plan.branch_steps)
        by_step = [branches[at : at + slices] for at in range(0, len(branches), slices)]
        rewards = np.stack([np.concatenate([r for _, r in step], axis=-1) for step in by_step], axis=1)  # [R, M, J, G]
        refs = tuple(tuple(ref for ref, _ in step) for step in by_step)
        return PromptRollout(unit.slot, unit.prompt, rewards, job.embedding, anchor, refs), scores

    def _branch_units(self, anchor: AnchorUnit) -> list[BranchUnit]:
        group = self._config.sampler.group_size
        size = self._config.rollout.members_per_unit or group
        return [
            BranchUnit(anchor.iteration, anchor.slot, anchor.prompt, step, first, min(size, group - first))
            for step in self._plan.branch_steps
            for first in range(0, group, size)
        ]

    @_again_if_lost
    async def _branch(self, job: "_Job", unit: BranchUnit, anchor: ray.ObjectRef) -> tuple[ray.ObjectRef, FloatArray]:
        """The transitions, and the scores [R, J, G'] of the images."""
        cost = unit.members * self._plan.branch_evaluations(unit.branch_step)
        branches, images = await self._compute(job, unit, anchor, cost=cost)
        shape = (len(self._plan.strides), unit.members)
        scores, _ = await asyncio.gather(
            self._score(unit, images, shape[0] * shape[1], list(self._config.rewards)),
            self._keep(branches, self._computing == 0),
        )
        return branches, np.stack([scores[name].reshape(shape) for name in self._config.rewards])

    @_again_if_lost
    async def _sample(self, job: "_Job", unit: SampleUnit) -> tuple[ray.ObjectRef, dict[str, FloatArray]]:
        _, images = await self._compute(job, unit, cost=len(unit.seeds) * (unit.steps or self._plan.steps))
        return images, await self._score(unit, images, len(unit.seeds), list(self._scorers))

    async def _compute(self, job: "_Job", unit: Unit, *args: Any, cost: int) -> list[ray.ObjectRef]:
        """The unit's result and images; anchors first, since branches wait for them, then the dearest first."""
        urgency = (job.iteration, 0) if isinstance(unit, AnchorUnit) else (job.iteration, 1, -cost)
        what = f"{unit.name} with weights {job.weights.manifest.version}"
        report: UnitReport
        self._computing += 1
        try:
            refs, report = await self._rollout.call(
                "compute", unit, job.weights, job.embedding, *args, priority=urgency, what=what
            )
        finally:
            self._computing -= 1
        assert report.evaluations == cost, f"{unit.name}: {report.evaluations} evaluations, {cost} planned"
        logger.info("%s: done by %s on %s in %.2f s", what, report.actor, report.place.address, report.seconds)
        self._timeline += report.spans()
        job.reports.append(report)
        job.last_image = time.perf_counter()
        return refs

    async def _score(self, unit: Unit, images: ray.ObjectRef, count: int, names: list[str]) -> dict[str, FloatArray]:
        """Scores [count] by reward; with them the images are used up."""
        try:
            scores = await asyncio.gather(
                *(self._scorers[name].score(images, count, unit.prompt, unit.name) for name in names)
            )
        finally:
            self._rollout.used()
        return dict(zip(names, scores, strict=True))
