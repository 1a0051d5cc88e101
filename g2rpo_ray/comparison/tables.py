"""The rows of a comparison as CSV and as Markdown."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from g2rpo_ray.comparison.statistics import Row
from g2rpo_ray.words import margin, number


def to_csv(rows: Sequence[Any], kind: type = Row) -> str:
    """A line for each row, of this dataclass; a number that is not there is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))
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
        cells = [_mean(row) for row in rows if row.adapter == adapter]
        lines.append(f"| {adapter} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(row: Row) -> str:
    there = not math.isnan(row.mean)
    return number(row.mean) + (margin(row.mean_high - row.mean) if there else "")


def _interval(row: Row) -> str:
    known = not math.isnan(row.difference_low)
    return f"{row.difference_low:+.4f} to {row.difference_high:+.4f}" if known else "one prompt gives none"


def _differences(rows: Sequence[Row]) -> str:
    lines = ["| adapter | reward | difference to base | 95 % interval | better | pairs |", "|---" * 6 + "|"]
    lines += [
        f"| {row.adapter} | {row.reward} | {row.difference:+.4f} | {_interval(row)} | {row.win_rate:.1%} | "
        f"{row.pairs} |"
        for row in rows
        if row.pairs
    ]
    return "\n".join(lines) if len(lines) > 2 else ""
