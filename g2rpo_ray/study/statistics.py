"""Intervals for runs of several seeds on the same prompts, where both seeds and prompts are samples.

The variance of the mean is the sum of two jackknife variances: each seed, and each prompt, is omitted in turn. The
interaction of seed and prompt is in both, so the sum is conservative. The 95 % interval is Student's, with
Satterthwaite's degrees of freedom. With three seeds that differ it is at least four times the standard error;
percentiles of a bootstrap of three seeds would be far too narrow.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from g2rpo_ray.analysis.statistics import Interval

Scores = NDArray[np.float64]


def crossed(scores: Scores, one_policy: bool = False) -> Interval:
    """Mean and 95 % interval of scores [seeds, prompts]; missing scores (NaN) are omitted.

    Args:
        scores: [seeds, prompts].
        one_policy: scores of one policy without seeds, as the base's [1, prompts]. Otherwise one seed has no interval.
    """
    there = np.isfinite(scores)
    if not there.any():
        return Interval(math.nan, math.nan, math.nan)
    values = np.where(there, scores, 0.0)
    mean = float(values.sum() / there.sum())
    parts = [_jackknife(values.sum(axis), there.sum(axis)) for axis in ((0,) if one_policy else (0, 1))]
    variance = sum(part for part, _ in parts)
    if not math.isfinite(variance):
        return Interval(mean, math.nan, math.nan)
    squares = sum(part**2 / freedom for part, freedom in parts)
    half = math.sqrt(variance) * float(stdtrit(variance**2 / squares, 0.975)) if variance else 0.0
    return Interval(mean, mean - half, mean + half)


def _jackknife(totals: Scores, counts: NDArray[np.int64]) -> tuple[float, int]:
    """Jackknife variance of the mean over groups with these sums and counts, and its degrees of freedom."""
    totals, counts = totals[counts > 0], counts[counts > 0]
    n = len(totals)
    if n < 2:
        return math.nan, 1
    without = (totals.sum() - totals) / (counts.sum() - counts)
    return float((n - 1) / n * ((without - without.mean()) ** 2).sum()), n - 1


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's 95 % interval of one number per seed."""
    return crossed(np.array([values], float), one_policy=True)


def crossing(costs: Sequence[float], means: Sequence[float], score: float) -> float:
    """The cost at which a curve first reaches a score, by linear interpolation; NaN if it never does."""
    for at, mean in enumerate(means):
        if mean >= score:
            if at == 0:
                return float(costs[0])
            share = (score - means[at - 1]) / (mean - means[at - 1])
            return float(costs[at - 1] + share * (costs[at] - costs[at - 1]))
    return math.nan
