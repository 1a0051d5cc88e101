"""The rows of a study as Markdown and JSON."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from g2rpo_ray.analysis.tables import markdown_table
from g2rpo_ray.study.rows import Results, VariantRow, about


def to_markdown(results: Results, rows: Sequence[VariantRow]) -> str:
    """Scores, differences and cost of each table."""
    study, counts, parts = results.plan.study, about(results), []
    for key, table in study.tables.items():
        these = [row for row in rows if row.table == key]
        if not these:
            parts.append(f"## {table.title}\n\nNo run of this table is finished.")
            continue
        prompts = len(next(iter(results.runs(key, results.variants(key)[0])[0]["scores"].values())))
        waiting = [name for name in table.variants if len(results.runs(key, name)) < len(table.seeds)]
        note = f"Seeds {', '.join(map(str, table.seeds))}; {prompts} held-out prompts; budget {study.budget:,} a run."
        note += f" **Seeds are missing** of: {', '.join(waiting)}." if waiting else ""
        parts += [f"## {table.title}", note, _scores(results, key, these)]
        parts += [_differences(results, key, these, other) for other in table.against]
        parts += [_early(results, key, these, other) for other in table.against]
        parts.append(_costs(counts.get(key, {}), these))
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores(results: Results, table: str, rows: Sequence[VariantRow]) -> str:
    trained = results.plan.trained(table)
    titles = [reward + (" (trained)" if reward in trained else "") for reward in results.plan.rewards(table)]
    return _grid("variant", titles, [row for row in rows if row.measure == "score"], _mean)


def _differences(results: Results, table: str, rows: Sequence[VariantRow], against: str) -> str:
    these = [row for row in rows if row.measure == "difference" and row.against == against]
    return _grid(f"difference to {against}", results.plan.rewards(table), these, _signed)


def _early(results: Results, table: str, rows: Sequence[VariantRow], against: str) -> str:
    these = [row for row in rows if row.measure == "early" and row.against == against]
    corner = f"at {results.plan.study.early or 0:.0%} of the budget, to {against} at its end"
    return _grid(corner, results.plan.rewards(table), these, _signed)


def _grid(corner: str, titles: Sequence[str], rows: Sequence[VariantRow], cell: Callable[[VariantRow], str]) -> str:
    """One line per variant and one column per reward, in the order of the rows."""
    variants = dict.fromkeys(row.variant for row in rows)
    cells = ([variant, *(cell(row) for row in rows if row.variant == variant)] for variant in variants)
    return markdown_table([corner, *titles], cells)


def _costs(counts_of: dict[str, dict[str, Any]], rows: Sequence[VariantRow]) -> str:
    labels = dict.fromkeys(row.of for row in rows if row.measure == "cost_to")
    head = ["variant", "learning rate", "iterations", "evaluations", "learner states", "cost", "seconds"]
    head += [f"{axis} to {label}" for label in labels for axis in ("cost", "seconds")]
    lines = []
    for variant, counts in counts_of.items():
        own = {(row.measure, row.of): row for row in rows if row.variant == variant}
        rate = f"{counts['lr']:g}" + (" (end of the grid)" if counts["at_end_of_grid"] else "")
        cells = [rate, *(f"{counts[key]:,}" for key in ("iterations", "evaluations", "states", "cost"))]
        cells.append(_count(own["seconds", ""]))
        cells += [_count(own[f"{axis}_to", label]) for label in labels for axis in ("cost", "seconds")]
        lines.append([variant, *cells])
    return markdown_table(head, lines)


def _mean(row: VariantRow) -> str:
    return f"{row.mean:.4f}" + _half(row, ".4f") if math.isfinite(row.mean) else "no score"


def _signed(row: VariantRow) -> str:
    """The difference and its interval, in bold if the interval excludes 0."""
    if not math.isfinite(row.low):
        return f"{row.mean:+.4f} (one seed: no interval)"
    words = f"{row.mean:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
    return f"**{words}**" if row.low > 0 or row.high < 0 else words


def _count(row: VariantRow) -> str:
    """Cost or seconds over the seeds that reached the score, with their number if not all did."""
    if not row.seeds:
        return f"0 of {row.of_seeds} seeds"
    some = f" ({row.seeds} of {row.of_seeds} seeds)" if row.seeds < row.of_seeds else ""
    return f"{row.mean:,.0f}{_half(row, ',.0f')}{some}"


def _half(row: VariantRow, spec: str) -> str:
    known = math.isfinite(row.high)
    return f" ± {format(row.high - row.mean, spec)}" if known else " (one seed: no interval)"


def to_json_table(results: Results, rows: Sequence[VariantRow]) -> dict[str, Any]:
    study = results.plan.study
    return {"study": study.model_dump(mode="json"), "runs": about(results), "rows": [asdict(row) for row in rows]}
