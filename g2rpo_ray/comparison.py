"""What scores say about an adapter: means, paired differences and win rates, with 95 % intervals; and their tables.

Intervals are Student's t over prompts: the scores of one prompt, which differ by the seed alone and are alike, are
averaged first. They answer what other prompts of this kind would give.
"""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.types import FloatArray

# The 97.5 % quantiles of Student's t with 1..9 degrees of freedom; beyond, a series in 1/df is right to four digits.
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


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


def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t."""
    if df <= len(T_QUANTILES):
        return T_QUANTILES[df - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / df**power for power, term in enumerate(terms))


def interval(scores: FloatArray) -> Interval:
    """Mean and 95 % t interval over prompts of scores [P, S]; a missing score (NaN) is left out."""
    present = [row[np.isfinite(row)].astype(np.float64) for row in scores]
    means = np.array([row.mean() for row in present if len(row)])
    if not len(means):
        return Interval(math.nan, math.nan, math.nan)
    mean = float(means.mean())
    if len(means) == 1:
        return Interval(mean, math.nan, math.nan)
    half = t_quantile(len(means) - 1) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return Interval(mean, mean - half, mean + half)


def win_rate(difference: NDArray[Any]) -> float:
    """Share of pairs that rose, ties half; a missing difference (NaN) is no pair, and NaN where there is none."""
    there = difference[np.isfinite(difference)]
    return float((there > 0).mean() + 0.5 * (there == 0).mean()) if len(there) else math.nan


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


def to_csv(rows: Sequence[Row]) -> str:
    """A line a row; a number that is not there is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    writer.writerows([_cell(value) for value in asdict(row).values()] for row in rows)
    return text.getvalue()


def _cell(value: float | str) -> float | str:
    return "" if isinstance(value, float) and math.isnan(value) else value


def to_markdown(rows: Sequence[Row]) -> str:
    """For each number of steps: the means, as a paper prints them, then the differences to the base."""
    parts = []
    for steps in dict.fromkeys(row.steps for row in rows):
        these = [row for row in rows if row.steps == steps]
        parts += [f"## {steps} steps", _means(these), _differences(these)]
    return "\n\n".join(part for part in parts if part)


def _means(rows: Sequence[Row]) -> str:
    titles = dict.fromkeys(row.reward + (" (trained)" if row.trained else "") for row in rows)
    lines = [f"| adapter | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for adapter in dict.fromkeys(row.adapter for row in rows):
        cells = [f"{row.mean:.4f} ± {row.mean_high - row.mean:.4f}" for row in rows if row.adapter == adapter]
        lines.append(f"| {adapter} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(rows: Sequence[Row]) -> str:
    lines = ["| adapter | reward | difference to base | 95 % interval | better | pairs |", "|---" * 6 + "|"]
    lines += [
        f"| {row.adapter} | {row.reward} | {row.difference:+.4f} | {row.difference_low:+.4f} to "
        f"{row.difference_high:+.4f} | {row.win_rate:.1%} | {row.pairs} |"
        for row in rows
        if row.pairs
    ]
    return "\n".join(lines) if len(lines) > 2 else ""
