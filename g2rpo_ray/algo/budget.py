"""Granularity as a budget: from what probes measured to the trees of the iterations that follow.

probe: a few prompts branch at every step, and complete at every granularity of the ladder
─► agreement of each granularity with the finest, spread within groups by step
─► the cheapest granularity that agrees, and the steps that matter
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo.schedule import completion_path
from g2rpo_ray.algo.signal import agreement, spreads
from g2rpo_ray.algo.tree import Tree

MEMORY = 0.5
"""Weight of what was known before a probe: a few groups alone tell a correlation to some hundredths."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What stands in the place of `auto`, for an iteration."""

    strides: tuple[int, ...]
    branch_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What probes tell: means over their comparison groups."""

    agreement: dict[int, float]
    """By stride, of those that are not the finest: the correlation of its advantages with the finest's."""
    spread: dict[int, float]
    """By branch step: the std of the finest scores within groups, as a share of the largest step's."""


def ladder(branch_step: int, steps: int, largest: int, layout: str) -> tuple[int, ...]:
    """Strides from 1 to `largest`, each of half of the evaluations of the one before, or less: 1, 2, 4, 8 of 10 steps.

    Args:
        branch_step: the index before the one where the longest completion starts.
    """

    def evaluations(stride: int) -> int:
        return len(completion_path(branch_step, steps, stride, layout)) - 1

    found = [1]
    for stride in range(2, min(largest, steps) + 1):
        if evaluations(stride) < evaluations(found[-1]) and evaluations(stride) <= (evaluations(found[-1]) + 1) // 2:
            found.append(stride)
    return tuple(found)


def measure(
    probes: Sequence[tuple[Tree, Tensor]], *, group: str, weights: Sequence[float], steps: Sequence[int] | None = None
) -> Measured:
    """What the probes of one iteration tell. What they cannot tell, for want of scores or spread, is left out.

    Args:
        probes: the tree of each, all of the same strides, and its scores [R, Q].
        weights: of the rewards.
        steps: those whose groups tell of agreement; None: all.
    """
    agreements: list[Tensor] = []
    by_step: list[dict[int, list[float]]] = [{} for _ in weights]
    for tree, scores in probes:
        finest = tree.strides.index(min(tree.strides))
        whole = replace(tree, trained=np.ones_like(tree.trained))  # at steps that are not trained now, too
        agreements.append(agreement(whole, scores, group=group, finest=finest, reward_weights=weights, steps=steps))
        for found, row in zip(by_step, scores, strict=True):
            for step, stds in spreads(whole, row, group=group, place=finest).items():
                found.setdefault(step, []).extend(stds)
    rows = dict(zip(probes[0][0].strides, torch.cat(agreements, 1), strict=True))
    means = {stride: float(row.nanmean()) for stride, row in rows.items() if row.isfinite().any()}
    means.pop(min(rows), None)
    return Measured(means, _shares(by_step, weights))


def pooled(before: Measured | None, now: Measured) -> Measured:
    """What is known after another probe: half of it from that one, where it tells anything."""
    if before is None:
        return now
    return Measured(_mixed(before.agreement, now.agreement), _mixed(before.spread, now.spread))


def agreeing(agreements: Mapping[int, float], threshold: float) -> int:
    """The largest stride that agrees with the finest, 1, at least so much; 1 where none does."""
    return max((stride for stride, value in agreements.items() if value >= threshold), default=1)


def mattering(spread: Mapping[int, float], share: float) -> tuple[int, ...]:
    """The steps whose spread is at least this share of the largest one's, ascending."""
    most = max(spread.values(), default=0.0)
    return tuple(step for step in sorted(spread) if spread[step] >= share * most)


def _shares(by_step: Sequence[Mapping[int, Sequence[float]]], weights: Sequence[float]) -> dict[int, float]:
    """Weighted mean over the rewards of each step's mean spread over the largest step's."""
    total: dict[int, float] = {}
    for found, weight in zip(by_step, weights, strict=True):
        means = {step: float(np.mean(stds)) for step, stds in found.items()}
        most = max(means.values(), default=0.0)
        for step, mean in means.items():
            total[step] = total.get(step, 0.0) + weight / sum(weights) * (mean / most if most else 1.0)
    return total


def _mixed(before: Mapping[int, float], now: Mapping[int, float]) -> dict[int, float]:
    known = {key: MEMORY * before.get(key, value) + (1 - MEMORY) * value for key, value in now.items()}
    return {**before, **known}
