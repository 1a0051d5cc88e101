"""From prompts to scored rollouts: what is asked of which pool, and what waits for what.

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

from actors.encoder import Embeddings
from actors.failures import is_lost_object
from actors.pool import Pool
from actors.reward import Scorer
from actors.weights import PublishedWeights
from g2rpo_ray.algo import Choice, Tree, compared_leaves
from g2rpo_ray.config import Config
from g2rpo_ray.record.panel import image_traces
from g2rpo_ray.rollout.plan import Part, branch_part, branch_units, prompt_tree, put_scores, put_win_rates, trunk_part
from g2rpo_ray.types import (
    BranchUnit,
    FloatArray,
    Images,
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
        self._embeddings = embeddings
        self._rollout = rollout
        self._scorers = scorers
        self._keep = keep
        self._timeline = timeline
        self._computing = 0  # units asked for that are not done

    async def rollout(
        self, iteration: int, prompts: Sequence[str], weights: PublishedWeights, choice: Choice | None = None
    ) -> Rollout:
        """Sample the tree of every prompt and score its leaves. `choice`: in the place of `auto`."""
        start = time.perf_counter()
        units = [TrunkUnit(iteration, slot, prompt, choice) for slot, prompt in enumerate(prompts)]
        jobs = [_Job(weights, iteration, ref) for ref in await self._embeddings.refs(prompts)]
        done = await asyncio.gather(*(self._prompt(job, unit) for job, unit in zip(jobs, units, strict=True)))
        reports = [report for job in jobs for report in job.reports]
        planned = self._config.velocity_cost * sum(made.tree.evaluations for made, _ in done)
        assert sum(report.evaluations for report in reports) == planned
        anchors = [scores for _, scores in done if scores]
        scores = {name: np.concatenate([anchor[name] for anchor in anchors]) for name in self._scorers if anchors}
        sampled = max(job.last_image for job in jobs) - start
        seconds = time.perf_counter() - start
        return Rollout([made for made, _ in done], scores, reports, weights.manifest.version, seconds, sampled)

    async def samples(self, iteration: int, prompts: Sequence[str], weights: PublishedWeights) -> Samples:
        """Sample every prompt with each evaluation seed and score the images with every reward.

        `iteration` is the one before which that is due: its units come first.
        """
        units = [SampleUnit(prompt, tuple(range(self._config.evaluation.seeds))) for prompt in prompts]
        jobs = [_Job(weights, iteration, ref) for ref in await self._embeddings.refs(prompts)]
        done = await asyncio.gather(*(self._look(job, unit) for job, unit in zip(jobs, units, strict=True)))
        scores = {name: np.stack([by_reward[name] for _, by_reward, _ in done]) for name in self._scorers}
        shown = [picture for picture, _, _ in done[: self._config.evaluation.grid_prompts]]
        evaluations = sum(report.evaluations for job in jobs for report in job.reports)
        return Samples(list(prompts), scores, shown, evaluations, [traces for _, _, traces in done])

    @_again_if_lost
    async def _look(self, job: "_Job", unit: SampleUnit) -> tuple[Images, dict[str, FloatArray], dict[str, float]]:
        """The first image, the scores, and what the hacking panel makes of the images; these are then let go."""
        ref, scores = await self._sample(job, unit)
        images = await ref
        return images[0].copy(), scores, await asyncio.to_thread(image_traces, images)

    async def sample(
        self, unit: SampleUnit, weights: PublishedWeights, embedding: ray.ObjectRef
    ) -> tuple[ray.ObjectRef, dict[str, FloatArray]]:
        """One unit's images [S, H, W, 3], by reference, and their scores [S] by reward."""
        return await self._sample(_Job(weights, 0, embedding), unit)

    @_again_if_lost
    async def _prompt(self, job: "_Job", unit: TrunkUnit) -> tuple[PromptRollout, dict[str, FloatArray]]:
        """The prompt's record, and the scores of its trunks' images by reward, trained or not."""
        tree = prompt_tree(self._config, unit.iteration, unit.slot, unit.prompt, unit.choice)
        part = trunk_part(tree)
        trunk, images = await self._compute(job, unit, cost=self._config.velocity_cost * part.evaluations)
        anchors, _, *branches = await asyncio.gather(
            self._score(unit, images, len(part.images), list(self._scorers)),
            self._keep(trunk, False),
            *(self._branch(job, branch, tree, trunk) for branch in branch_units(self._config, tree, unit)),
        )
        scores = np.full((len(self._config.rewards), len(tree.leaf)), np.nan, np.float32)
        for below, found in [(part, anchors), *((below, found) for _, below, found, _ in branches)]:
            put_scores(scores, tree, below, [found[name] for name in self._config.rewards if found])
        await self._compare(unit, tree, scores, [(below, kept) for _, below, _, kept in branches])
        refs = tuple(ref for ref, _, _, _ in branches)
        place = (unit.iteration, unit.slot, unit.prompt)
        return PromptRollout(*place, tree, scores, job.embedding, trunk, refs), anchors

    @_again_if_lost
    async def _branch(
        self, job: "_Job", unit: BranchUnit, tree: Tree, trunk: ray.ObjectRef
    ) -> tuple[ray.ObjectRef, Part, dict[str, FloatArray], ray.ObjectRef | None]:
        """The stochastic edges, what of the tree they are, the scores [I] of the images by trained reward, and the
        images where a reward needs those of other units, too.
        """
        part = branch_part(tree, unit)
        branches, images = await self._compute(job, unit, trunk, cost=self._config.velocity_cost * part.evaluations)
        scores, _ = await asyncio.gather(
            self._score(unit, images, len(part.images), list(self._config.rewards)),
            self._keep(branches, self._computing == 0),
        )
        together = any(self._scorers[name].takes_groups for name in self._config.rewards)
        return branches, part, scores, images if together else None

    async def _compare(
        self, unit: TrunkUnit, tree: Tree, scores: FloatArray, parts: Sequence[tuple[Part, ray.ObjectRef | None]]
    ) -> None:
        """Put into scores [R, Q] what is told from whole groups, whatever units their images came in."""
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
        """The unit's result and images; trunks first, since branches wait for them, then the dearest first."""
        urgency = (job.iteration, 0) if isinstance(unit, TrunkUnit) else (job.iteration, 1, -cost)
        what = f"{unit.name} with weights {job.weights.manifest.version}"
        report: UnitReport
        self._computing += 1
        try:
            refs, report = await self._rollout.call(
                "compute", unit, job.weights, job.embedding, *args, priority=urgency, what=what, cost=cost
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
        """Scores [count] by reward, nothing where there is no image; with them the images are used up.

        Those of rewards that take whole groups are NaN: a share of a group says nothing of the group.
        """
        try:
            if not count:
                return {}
            alone = [name for name in names if not self._scorers[name].takes_groups]
            scores = await asyncio.gather(
                *(self._scorers[name].score([images], count, unit.prompt, unit.name) for name in alone)
            )
        finally:
            self._rollout.used()
        return {name: np.full(count, np.nan, np.float32) for name in names} | dict(zip(alone, scores, strict=True))
