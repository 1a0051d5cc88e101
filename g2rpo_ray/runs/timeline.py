"""The timeline of an iteration: a Chrome trace (chrome://tracing, ui.perfetto.dev) and a picture."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from g2rpo_ray.analysis.svg import drawing
from g2rpo_ray.runs.storage import replace_text
from g2rpo_ray.types import Span

WIDTH, ROW = 11.0, 0.2  # inches of the picture: all, a row
COLOURS = {
    "trunk": "#4c78a8", "branch": "#72b7b2", "sample": "#b279a2", "weights": "#e45756", "score": "#f2a93b",
    "rollout": "#dddddd", "update": "#54a24b", "broadcast": "#e45756", "evaluation": "#b279a2", "checkpoint": "#9d755d",
}  # fmt: skip


def write_timeline(folder: Path, iteration: int, spans: Sequence[Span]) -> None:
    """Write `timeline/<iteration>.json` and `.svg` in the run directory. Gaps in a row are time that it waited."""
    target = folder / "timeline" / f"{iteration:06d}"
    replace_text(target.with_suffix(".json"), json.dumps(chrome_trace(spans)) + "\n")
    replace_text(target.with_suffix(".svg"), picture(spans))


def chrome_trace(spans: Sequence[Span]) -> dict[str, object]:
    """Complete events in microseconds, a process for each machine and a thread for each actor."""
    rows = {who: number for number, who in enumerate(_by_row(spans), start=1)}
    machines = {address: number for number, address in enumerate(sorted({span.address for span in spans}), start=1)}
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": address}} for address, pid in machines.items()
    ]
    for who, tid in rows.items():
        pids = {machines[span.address] for span in spans if span.who == who}
        events += [{"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": who}} for pid in pids]
    events += [
        {
            "ph": "X", "name": span.what, "cat": kind(span), "pid": machines[span.address], "tid": rows[span.who],
            "ts": 1e6 * span.started, "dur": 1e6 * span.seconds, "args": {"weights_version": span.weights_version},
        }
        for span in spans
    ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def kind(span: Span) -> str:
    """The kind of work of a span, from the unit's name; reward servers only score."""
    return "score" if span.who.startswith("reward ") else span.what.split("/")[0]


def picture(spans: Sequence[Span]) -> str:
    """An SVG: a row for each actor, with the share of the time in which it worked."""
    rows = _by_row(spans)
    start, end = min(span.started for span in spans), max(span.started + span.seconds for span in spans)
    with drawing(WIDTH, 0.9 + ROW * len(rows)) as made:
        axes = made.axes
        for number, row in enumerate(rows.values()):
            for sort in dict.fromkeys(map(kind, row)):
                bars = [(span.started - start, span.seconds) for span in row if kind(span) == sort]
                axes.broken_barh(bars, (number - 0.4, 0.8), color=COLOURS.get(sort, "#999999"), linewidth=0)
        axes.set_yticks(range(len(rows)), [f"{who}  {_busy(row, end - start):.0%}" for who, row in rows.items()])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, max(end - start, 1e-9)), xlabel="seconds")
        axes.grid(False, axis="y")
        seen = {kind(span) for span in spans}
        for name in (name for name in COLOURS if name in seen):
            axes.barh(0, 0, color=COLOURS[name], label=name)
        axes.legend(ncols=len(seen), loc="lower left", bbox_to_anchor=(0, 1), handlelength=1)
    return made.svg


def _busy(row: Sequence[Span], seconds: float) -> float:
    return sum(span.seconds for span in row) / max(seconds, 1e-9)


def _by_row(spans: Sequence[Span]) -> dict[str, list[Span]]:
    rows = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.started):
        rows[span.who].append(span)
    order = sorted(rows, key=lambda who: (who == "rollout" or who.startswith("rollout"), who))
    return {who: rows[who] for who in order}
