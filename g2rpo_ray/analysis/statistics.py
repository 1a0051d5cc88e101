"""Statistics of scores: means, paired differences and win rates, with 95 % intervals.

`evaluate`, the summary of a run, its report, the hacking panel, BEST and studies use only these. Intervals are
Student's t over prompts, after the mean over a prompt's seeds, whose scores are correlated. They cover the choice of
prompts. Dimensions: P prompts, S seeds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from g2rpo_ray.types import FloatArray


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over prompts and its 95 % interval, NaN where there are too few."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One reward under two policies, on the prompts and seeds with scores of both; NaN where there are too few."""

    before: float
    after: float
    difference: float
    low: float  # 95 % interval of the difference
    high: float
    win_rate: float  # share of pairs that rose, ties half
    pairs: int  # (prompt, seed)


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """Scores of one adapter by one reward at one number of steps, and differences to the base on the same noise."""

    steps: int
    adapter: str
    reward: str
    trained: bool  # whether the configuration trains on this reward
    mean: float
    mean_low: float
    mean_high: float
    scores: int
    missing: int
    difference: float
    difference_low: float
    difference_high: float
    win_rate: float  # share of pairs (prompt, seed) with a higher score than the base's, ties half
    pairs: int


def interval(scores: NDArray[Any], chance: float = 0.05) -> Interval:
    """Mean and 95 % t interval over prompts of scores [P, S]; a missing score (NaN) is left out.

    `chance`: that the mean is outside.
    """
    present = [row[np.isfinite(row)].astype(np.float64) for row in scores]
    means = np.array([row.mean() for row in present if len(row)])
    if not len(means):
        return Interval(math.nan, math.nan, math.nan)
    mean = float(means.mean())
    if len(means) == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(stdtrit(len(means) - 1, 1 - chance / 2)) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return Interval(mean, mean - half, mean + half)


def compare(before: FloatArray, after: FloatArray) -> Comparison:
    """Compare scores [P, S] of the same prompts and seeds; a pair with a missing score is left out."""
    difference = after.astype(np.float64) - before
    there = np.isfinite(difference)
    mean_before, mean_after = (interval(np.where(there, scores, np.nan)).mean for scores in (before, after))
    paired, risen = interval(difference), difference[there]
    won = float((risen > 0).mean() + 0.5 * (risen == 0).mean()) if len(risen) else math.nan
    return Comparison(mean_before, mean_after, paired.mean, paired.low, paired.high, won, len(risen))


def compare_all(before: Mapping[str, FloatArray], after: Mapping[str, FloatArray]) -> dict[str, Comparison]:
    """Compare all rewards that both have."""
    return {name: compare(before[name], after[name]) for name in after if name in before}


def judges(trained: Iterable[str], others: Iterable[str], start: Mapping[str, FloatArray]) -> list[str]:
    """The rewards that select the best policy: the trained ones with scores in `start` (rewards that compare groups
    have none); if there are none, the others with scores."""
    scored = {name for name, scores in start.items() if np.isfinite(scores).any()}
    return [name for name in trained if name in scored] or [name for name in others if name in scored]


def row(
    steps: int, adapter: str, reward: str, trained: bool, scores: FloatArray, base: FloatArray | None
) -> AdapterRow:
    """The row of an adapter's scores [P, S]; `base` has the base's on the same prompts and seeds, None for the base."""
    own = interval(scores)
    paired = compare(np.full_like(scores, np.nan) if base is None else base, scores)
    return AdapterRow(
        *(steps, adapter, reward, trained, own.mean, own.low, own.high),
        *(int(np.isfinite(scores).sum()), int((~np.isfinite(scores)).sum())),
        *(paired.difference, paired.low, paired.high),
        win_rate=paired.win_rate,
        pairs=paired.pairs,
    )
