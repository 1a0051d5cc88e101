"""What the ranks of a learner share: how prompts are spread, what each optimizer step is made of, metrics that add up.

Torch and numpy only: the driver uses this too, and neither DeepSpeed nor a model may be imported there. Shapes as in
`g2rpo_ray.types`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from g2rpo_ray.algo import batch_std, scored_edges
from g2rpo_ray.config import LearnerConfig
from g2rpo_ray.types import Ints, PromptRollout

StepKey = tuple[int, int | None]
"""Part of the iteration's prompts, and schedule index at which the edges start; None: at any."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """One optimizer step, over all ranks."""

    key: StepKey
    edges: int  # trained ones that have all their scores, once for each state that serves them: the denominator
    states: int  # most that one rank has; the others evaluate as many, since each pass may be a collective


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a rank must know of the whole batch, so that its part of the loss does not depend on where the rest is."""

    prompts: int
    steps: tuple[StepShape, ...]  # in order; a step without a scored edge is none
    batch_std: tuple[float, ...]  # [R]
    on_policy: bool = True  # sampled with the weights that are updated: the ratio must begin at 1

    @classmethod
    def of(
        cls, shards: Sequence[Sequence[PromptRollout]], learner: LearnerConfig, on_policy: bool = True
    ) -> "BatchShape":
        """`shards`: of all ranks, as `spread` makes them."""
        real = {rollout.slot: rollout for shard in shards for rollout in shard if np.isfinite(rollout.scores).any()}
        prompts = max((rollout.slot for shard in shards for rollout in shard), default=0) + 1
        edges: dict[StepKey, int] = {}
        for rollout in real.values():
            scored = scored_edges(rollout.tree, torch.tensor(rollout.scores)).numpy() & rollout.tree.trained
            for key, _, served, _ in state_places(rollout, prompts, learner):
                edges[key] = edges.get(key, 0) + int(scored[served].sum())
        counts: list[dict[StepKey, int]] = []
        for shard in shards:
            counts.append({})
            for rollout in shard:
                for key, *_ in state_places(rollout, prompts, learner):
                    counts[-1][key] = counts[-1].get(key, 0) + 1
        steps = tuple(
            StepShape(key, number, max(count.get(key, 0) for count in counts))
            for key, number in sorted(edges.items(), key=lambda item: (item[0][0], item[0][1] or 0))
            if number
        )
        ordered = [real[slot] for slot in sorted(real)]
        scores = [torch.tensor(rollout.scores) for rollout in ordered]
        std = batch_std([rollout.tree for rollout in ordered], scores).tolist() if ordered else []
        return cls(prompts, steps, tuple(std), on_policy)


def state_places(
    rollout: PromptRollout, prompts: int, learner: LearnerConfig
) -> Iterator[tuple[StepKey, int, Ints, int]]:
    """The states of a prompt: the optimizer step of each, its node, the trained edges that it serves, its draw.

    The forward process has `draws` of each image, which serve the last edge before it.
    """
    tree, part = rollout.tree, rollout.slot * learner.updates_per_rollout // prompts
    for node in (tree.trained_images if learner.forward else tree.states).tolist():
        served = tree.last_edge[[node]] if learner.forward else np.flatnonzero((tree.source == node) & tree.trained)
        start = int(tree.start[served[0]]) if learner.schedule == "per_step" else None
        for draw in range(learner.draws if learner.forward else 1):
            yield (part, start), node, served, draw


def spread(rollouts: Sequence[PromptRollout], ranks: int) -> list[list[PromptRollout]]:
    """The prompts of each rank; one that would have none gets one without scores, which counts in no loss."""
    mute = replace(rollouts[0], scores=np.full_like(rollouts[0].scores, np.nan))
    return [list(rollouts[rank::ranks]) or [mute] for rank in range(ranks)]


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """One rank's part of an update's metrics: over the ranks, sums add up and maxima are compared."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def largest(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def add_advantages(self, values: torch.Tensor, flat_groups: int) -> None:
        """Count the advantages of scored edges, and the comparison groups without spread."""
        values = values.double()
        self.add("advantage/zero_std_groups", flat_groups)
        self.add("edges", values.numel())
        self.add("advantage", float(values.sum()))
        self.add("advantage_squared", float(values.square().sum()))
        self.largest("advantage/abs_max", float(values.abs().max()) if values.numel() else 0.0)


def reduce_metrics(ranks: Sequence[RankMetrics]) -> dict[str, float]:
    """The update's metrics, by the names of the run directory, from every rank's part."""
    sums, maxima = RankMetrics(), RankMetrics()
    for rank in ranks:
        for name, value in rank.sums.items():
            sums.add(name, value)
        for name, value in rank.maxima.items():
            maxima.largest(name, value)
    edges = sums.sums.pop("edges")
    mean = sums.sums.pop("advantage") / edges
    variance = sums.sums.pop("advantage_squared") / edges - mean**2
    return {
        **sums.sums,
        **maxima.maxima,
        "advantage/mean": mean,
        "advantage/std": math.sqrt(max(variance, 0.0)),
    }
