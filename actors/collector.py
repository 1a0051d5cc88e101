"""Plans the units of an iteration, sends them to the pools, assembles the results.

    prompt ─► tree ─► trunk ─┬─► branch units, a branch step and some children each ─► images ─► scores ─► PromptRollout
                             └─► images, if anchors are scored: the on-policy evaluation

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

from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.actors.pool.failures import is_lost_object
from g2rpo_ray.actors.pool.order import urgency
from g2rpo_ray.actors.workers.encoder import Embeddings
from g2rpo_ray.actors.workers.reward import Scorer
from g2rpo_ray.actors.workers.weights import PublishedWeights
from g2rpo_ray.algo.completion import Choice
from g2rpo_ray.algo.tree import Tree, compared_leaves
from g2rpo_ray.analysis.video import strip
from g2rpo_ray.config import Config
from g2rpo_ray.rollout.plan import (
    Look,
    Part,
    branch_part,
    branch_units,
    exact_units,
    heldout_samples,
    heldout_units,
    leaf_scores,
    prompt_tree,
    put_win_rates,
    rollout_evaluations,
    trunk_part,
)
from g2rpo_ray.runs.hacking import image_traces
from g2rpo_ray.types import (
    BranchUnit,
    FloatArray,
    Ints,
    PromptRollout,
    Rollout,
    Samples,
    SampleUnit,
    Span,
    TrunkUnit,
    Unit,
    UnitReport,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ATTEMPTS = 5  # of a unit, and of a prompt; an attempt is lost only with a node


@dataclass(slots=True)
class _Job:
    """Inputs and reports that the units of one prompt share."""

    weights: PublishedWeights
    iteration: int  # of the units; held-out units come before it
    embedding: ray.ObjectRef
    reports: list[UnitReport] = field(default_factory=list)
    last_image: float = 0.0


def _again_if_lost(work: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Coroutine[Any, Any, T]]:
    """Repeat work whose result in the object store was lost with a node; the result is the same."""

    @functools.wraps(work)
    async def persistent(collector: "Collector", job: _Job, unit: Unit, *args: Any) -> T:
        for _ in range(MAX_ATTEMPTS - 1):
            attempt = _Job(job.weights, job.iteration, job.embedding)
            try:
                result = await work(collector, attempt, unit, *args)
            except ray.exceptions.RayError as error:
                if not is_lost_object(error):
                    raise
                logger.warning("%s: retried, because an object was lost (%s)", unit.name, type(error).__name__)
            else:
                job.reports += attempt.reports
                job.last_image = max(job.last_image, attempt.last_image)
                return result
        return await work(collector, job, unit, *args)

    return persistent


class Collector:
    """Plans the units of an iteration, sends them to the pools, assembles the results."""

    def __init__(
        self,
        config: Config,
        embeddings: Embeddings,
        rollout: Pool,
        completions: Pool,
        scorers: Mapping[str, Scorer],
        keep: Callable[[ray.ObjectRef], Awaitable[None]],
        timeline: list[Span],
    ):
        """
        Args:
            completions: computes branch units, unless they are exact; may be `rollout`.
            keep: prefetches a unit's result to the learner's node, so that it survives the node that computed it.
            timeline: receives a span for each unit and score.
        """
        self._config = config
        self._embeddings = embeddings
        self._rollout, self._completions = rollout, completions
        self._scorers = scorers
        self._keep = keep
        self._timeline = timeline

    async def rollout(
        self, iteration: int, prompts: Sequence[str], weights: PublishedWeights, choice: Choice | None = None
    ) -> Rollout:
        """Sample the tree of each prompt and score its leaves. `choice`: the values of `auto`."""
        start = time.perf_counter()
        units = [TrunkUnit(iteration, slot, prompt, choice) for slot, prompt in enumerate(prompts)]
        jobs = [_Job(weights, iteration, ref) for ref in await self._embeddings.refs(prompts)]
        done = await asyncio.gather(*(self._prompt(job, unit) for job, unit in zip(jobs, units, strict=True)))
        reports = [report for job in jobs for report in job.reports]
        planned = sum(rollout_evaluations(self._config, made.tree, iteration, made.slot) for made, _ in done)
        assert sum(report.evaluations for report in reports) == planned
        anchors = [scores for _, scores in done if scores]
        scores = {name: np.concatenate([anchor[name] for anchor in anchors]) for name in self._scorers if anchors}
        sampled = max(job.last_image for job in jobs) - start
        seconds = time.perf_counter() - start
        sampled_with = weights.manifest
        made = [prompt for prompt, _ in done]
        return Rollout(made, scores, reports, sampled_with.version, seconds, sampled, sampled_with.checksum)

    async def samples(self, iteration: int, prompts: Sequence[str], weights: PublishedWeights) -> Samples:
        """Sample each prompt with each evaluation seed and score the images with every reward.

        `iteration`: the one before which this is due; these units are more urgent than its own.
        """
        units = heldout_units(self._config, prompts)
        jobs = [_Job(weights, iteration, ref) for ref in await self._embeddings.refs(prompts)]
        done = await asyncio.gather(*(self._look(job, unit) for job, unit in zip(jobs, units, strict=True)))
        return heldout_samples(
            self._config, prompts, done, sum(report.evaluations for job in jobs for report in job.reports)
        )

    @_again_if_lost
    async def _look(self, job: "_Job", unit: SampleUnit) -> Look:
        """The first image, the scores, and the panel's numbers; the other images are released."""
        ref, scores = await self._sample(job, unit)
        images = await ref
        return Look(strip(images[0]).copy(), scores, await asyncio.to_thread(image_traces, images))

    async def sample(
        self, unit: SampleUnit, weights: PublishedWeights, embedding: ray.ObjectRef
    ) -> tuple[ray.ObjectRef, dict[str, FloatArray]]:
        """A reference to one unit's images [S, H, W, 3], and their scores [S] by reward."""
        return await self._sample(_Job(weights, 0, embedding), unit)

    @_again_if_lost
    async def _prompt(self, job: "_Job", unit: TrunkUnit) -> tuple[PromptRollout, dict[str, FloatArray]]:
        """The prompt's rollout, and the scores of its trunks' images by reward, trained or not."""
        tree = prompt_tree(self._config, unit.iteration, unit.slot, unit.prompt, unit.choice)
        part = trunk_part(tree)
        trunk, images = await self._compute(job, unit, cost=self._config.velocity_cost * part.evaluations)
        units = [*branch_units(self._config, tree, unit)]
        anchors, _, *below = await asyncio.gather(
            self._score(unit, images, len(part.images), list(self._scorers)),
            self._keep(trunk),
            *(self._branch(job, of, tree, trunk) for of in [*units, *exact_units(self._config, tree, unit)]),
        )
        branches, exact = below[: len(units)], below[len(units) :]
        scores, exact_scores = [
            leaf_scores(self._config, tree, [(part, anchors), *((of, found) for _, of, found, _ in some)])
            for some in (branches, exact)
        ]
        await self._compare(unit, tree, scores, [(of, kept) for _, of, _, kept in branches])
        refs = tuple(ref for ref, _, _, _ in branches)
        place = (unit.iteration, unit.slot, unit.prompt)
        made = PromptRollout(*place, tree, scores, job.embedding, trunk, refs, exact_scores if exact else None)
        return made, anchors

    @_again_if_lost
    async def _branch(
        self, job: "_Job", unit: BranchUnit, tree: Tree, trunk: ray.ObjectRef
    ) -> tuple[ray.ObjectRef, Part, dict[str, FloatArray], ray.ObjectRef | None]:
        """The unit's edges, their part of the tree, the scores [I] by trained reward, and the images.

        The images are given only if a reward compares those of several units.
        """
        part = branch_part(tree, unit)
        branches, images = await self._compute(job, unit, trunk, cost=self._config.velocity_cost * part.evaluations)
        scores, _ = await asyncio.gather(
            self._score(unit, images, len(part.images), list(self._config.rewards)),
            self._keep(branches),
        )
        together = any(self._scorers[name].takes_groups for name in self._config.rewards)
        return branches, part, scores, images if together else None

    async def _compare(
        self, unit: TrunkUnit, tree: Tree, scores: FloatArray, parts: Sequence[tuple[Part, ray.ObjectRef | None]]
    ) -> None:
        """Put the scores of rewards that compare whole groups into scores [R, Q]; a group may span several units."""
        place = {int(node): (at, row) for at, (part, _) in enumerate(parts) for row, node in enumerate(part.images)}

        async def ask(row: int, scorer: Scorer, number: int, leaves: Ints) -> None:
            picks = [place[int(node)] for node in tree.leaf[leaves]]
            needed = sorted({at for at, _ in picks})
            images = [ref for ref in (parts[at][1] for at in needed) if ref is not None]
            picks = [(needed.index(at), of_unit) for at, of_unit in picks]
            what = f"group/{unit.iteration}/{unit.slot}/{number}"
            scores[row, leaves] = await scorer.score(images, len(leaves), unit.prompt, what, picks)

        scorers = [self._scorers[name] for name in self._config.rewards]
        takers = [(row, scorer) for row, scorer in enumerate(scorers) if scorer.takes_groups]
        together = compared_leaves(tree, self._config.credit.group) if takers else []
        await asyncio.gather(*(ask(*taker, *part) for taker in takers for part in enumerate(together)))
        put_win_rates(scores, tree, self._config)

    @_again_if_lost
    async def _sample(self, job: "_Job", unit: SampleUnit) -> tuple[ray.ObjectRef, dict[str, FloatArray]]:
        steps = unit.steps or self._config.sampler.steps
        _, images = await self._compute(job, unit, cost=self._config.sample_cost * len(unit.seeds) * steps)
        return images, await self._score(unit, images, len(unit.seeds), list(self._scorers))

    async def _compute(self, job: "_Job", unit: Unit, *args: Any, cost: int) -> list[ray.ObjectRef]:
        """The unit's result and images."""
        priority = urgency(job.iteration, cost, isinstance(unit, TrunkUnit))
        what = f"{unit.name} with weights {job.weights.manifest.version}"
        report: UnitReport
        refs, report = await self._pool(unit).call(
            "compute", unit, job.weights, job.embedding, *args, priority=priority, what=what, cost=cost
        )
        assert report.evaluations == cost, f"{unit.name}: {report.evaluations} evaluations, {cost} planned"
        logger.info("%s: done by %s on %s in %.2f s", what, report.actor, report.place.address, report.seconds)
        self._timeline += report.spans()
        job.reports.append(report)
        job.last_image = time.perf_counter()
        return refs

    def _pool(self, unit: Unit) -> Pool:
        return self._completions if isinstance(unit, BranchUnit) and not unit.exact else self._rollout

    async def _score(self, unit: Unit, images: ray.ObjectRef, count: int, names: list[str]) -> dict[str, FloatArray]:
        """Scores [count] by reward; empty if there is no image. Afterwards the pool may start another unit.

        Scores of rewards that compare whole groups are NaN here.
        """
        try:
            if not count:
                return {}
            alone = [name for name in names if not self._scorers[name].takes_groups]
            scores = await asyncio.gather(
                *(self._scorers[name].score([images], count, unit.prompt, unit.name) for name in alone)
            )
        finally:
            self._pool(unit).used()
        return {name: np.full(count, np.nan, np.float32) for name in names} | dict(zip(alone, scores, strict=True))
