"""Comparisons as CSV and as Markdown."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from g2rpo_ray.analysis.statistics import AdapterRow, Comparison
from g2rpo_ray.messages import margin, number


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of these cells; empty without rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) if len(lines) > 1 else ""


def to_csv(rows: Sequence[Any], kind: type = AdapterRow) -> str:
    """A line for each row, of this dataclass; a number that is not there is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))
    writer.writerows([_cell(value) for value in asdict(row).values()] for row in rows)
    return text.getvalue()


def _cell(value: float | str) -> float | str:
    return "" if isinstance(value, float) and math.isnan(value) else value


def to_markdown(rows: Sequence[AdapterRow]) -> str:
    """For each number of steps: the means, as a paper prints them, then the differences to the base."""
    parts = []
    for steps in dict.fromkeys(row.steps for row in rows):
        these = [row for row in rows if row.steps == steps]
        parts += [f"## {steps} steps", _means(these), _differences(these)]
    return "\n\n".join(part for part in parts if part)


def _means(rows: Sequence[AdapterRow]) -> str:
    titles = dict.fromkeys(row.reward + (" (trained)" if row.trained else "") for row in rows)
    adapters = dict.fromkeys(row.adapter for row in rows)
    cells = ([adapter, *(_mean(row) for row in rows if row.adapter == adapter)] for adapter in adapters)
    return markdown_table(["adapter", *titles], cells)


def _mean(row: AdapterRow) -> str:
    there = not math.isnan(row.mean)
    return number(row.mean) + (margin(row.mean_high - row.mean) if there else "")


def _interval(low: float, high: float) -> str:
    return "one prompt gives none" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"


def _differences(rows: Sequence[AdapterRow]) -> str:
    cells = (
        (
            row.adapter, row.reward, f"{row.difference:+.4f}", _interval(row.difference_low, row.difference_high),
            f"{row.win_rate:.1%}", row.pairs,
        )
        for row in rows
        if row.pairs
    )  # fmt: skip
    return markdown_table(["adapter", "reward", "difference to base", "95 % interval", "better", "pairs"], cells)


def before_and_after(comparisons: Mapping[str, Comparison], trained: Sequence[str]) -> str:
    """A Markdown table, one row for each reward: a policy before and after training."""
    head = ["held-out reward", "before", "after", "difference", "95 % interval", "better", "pairs"]
    cells = (
        (
            name + (" (trained)" if name in trained else ""), number(found.before), number(found.after),
            number(found.difference, "+.4f"), _interval(found.low, found.high) if found.pairs else "–",
            number(found.win_rate, ".0%"), found.pairs,
        )
        for name, found in comparisons.items()
    )  # fmt: skip
    return markdown_table(head, cells)
