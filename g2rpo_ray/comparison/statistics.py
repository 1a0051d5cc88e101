"""What scores say about an adapter: means, paired differences and win rates, with 95 % intervals.

Intervals are Student's t over prompts: the scores of one prompt, which differ by the seed alone and are alike, are
averaged first. They answer what other prompts of this kind would give.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from g2rpo_ray.record.heldout import win_rate
from g2rpo_ray.types import FloatArray


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over prompts and its 95 % interval, NaN where there are too few."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter by one reward at one number of steps; the differences are to the base, on the same noise."""

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


def interval(scores: FloatArray) -> Interval:
    """Mean and 95 % t interval over prompts of scores [P, S]; a missing score (NaN) is left out."""
    present = [row[np.isfinite(row)].astype(np.float64) for row in scores]
    means = np.array([row.mean() for row in present if len(row)])
    if not len(means):
        return Interval(math.nan, math.nan, math.nan)
    mean = float(means.mean())
    if len(means) == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(stdtrit(len(means) - 1, 0.975)) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return Interval(mean, mean - half, mean + half)


def row(steps: int, adapter: str, reward: str, trained: bool, scores: FloatArray, base: FloatArray | None) -> Row:
    """The row of an adapter's scores [P, S], against the base's of the same prompts and seeds; None: it is the base."""
    own = interval(scores)
    difference = scores - base if base is not None else np.full_like(scores, np.nan)
    paired = interval(difference)
    return Row(
        *(steps, adapter, reward, trained, own.mean, own.low, own.high),
        *(int(np.isfinite(scores).sum()), int((~np.isfinite(scores)).sum())),
        *(paired.mean, paired.low, paired.high),
        win_rate=win_rate(difference),
        pairs=int(np.isfinite(difference).sum()),
    )
