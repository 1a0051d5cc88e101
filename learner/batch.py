"""What the ranks of a learner share: how prompts are spread, the loss's denominators, and metrics that add up.

Torch and numpy only: the driver uses this too, and neither DeepSpeed nor a model may be imported there. Shapes as in
`g2rpo_ray.types`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from g2rpo_ray.algo import complete_members, without_spread
from g2rpo_ray.types import PromptRollout


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a rank must know of the whole batch, so that its part of the loss does not depend on where the rest is."""

    members: tuple[int, ...]  # [M], over all prompts, those with all their scores: the denominators of the loss
    on_policy: bool = True  # sampled with the weights that are updated: the ratio must begin at 1

    @classmethod
    def of(cls, rollouts: Sequence[PromptRollout], on_policy: bool = True) -> "BatchShape":
        scored = [complete_members(torch.isfinite(torch.tensor(rollout.rewards))) for rollout in rollouts]  # P x [M, G]
        return cls(tuple(torch.stack(scored).sum((0, 2)).tolist()), on_policy)


def spread(rollouts: Sequence[PromptRollout], ranks: int) -> list[list[PromptRollout]]:
    """One shard a rank, all of the same length: under ZeRO every rank must run the same forward and backward passes.

    Shards that would be shorter get a prompt without scores, none of whose members counts in the loss.
    """
    mute = replace(rollouts[0], rewards=np.full_like(rollouts[0].rewards, np.nan))
    padded = [*rollouts, *[mute] * (-len(rollouts) % ranks)]
    return [padded[rank::ranks] for rank in range(ranks)]


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """One rank's part of an update's metrics: over the ranks, sums add up and maxima are compared."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def largest(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)


def add_advantages(metrics: RankMetrics, rollout: PromptRollout, advantage: torch.Tensor, valid: torch.Tensor) -> None:
    """Count one prompt's advantages [M, G] over its `valid` members, and its groups (r, i, j) without spread."""
    rewards = torch.tensor(rollout.rewards)
    scored = torch.isfinite(rewards)
    flat = without_spread(rewards, scored) & scored.any(-1)  # a group without any score is missing, not flat
    values = advantage[valid].double()
    metrics.add("advantage/zero_std_groups", int(flat.sum()))
    metrics.add("members", values.numel())
    metrics.add("advantage", float(values.sum()))
    metrics.add("advantage_squared", float(values.square().sum()))
    metrics.largest("advantage/abs_max", float(values.abs().max()) if values.numel() else 0.0)


def reduce_metrics(ranks: Sequence[RankMetrics]) -> dict[str, float]:
    """The update's metrics, by the names of the run directory, from every rank's part."""
    sums, maxima = RankMetrics(), RankMetrics()
    for rank in ranks:
        for name, value in rank.sums.items():
            sums.add(name, value)
        for name, value in rank.maxima.items():
            maxima.largest(name, value)
    members = sums.sums.pop("members")
    mean = sums.sums.pop("advantage") / members
    variance = sums.sums.pop("advantage_squared") / members - mean**2
    return {
        **sums.sums,
        **maxima.maxima,
        "advantage/mean": mean,
        "advantage/std": math.sqrt(max(variance, 0.0)),
    }
