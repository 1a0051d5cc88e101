"""Who did what when in one iteration: a Chrome trace (chrome://tracing, ui.perfetto.dev) and a picture."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from g2rpo_ray.record.storage import replace_text
from g2rpo_ray.types import Span

WIDTH, LABEL, ROW, AXIS = 1400, 260, 18, 24  # pixels of the picture: all, names, a row, the axis
COLOURS = {
    "trunk": "#4c78a8", "branch": "#72b7b2", "sample": "#b279a2", "weights": "#e45756", "score": "#f2a93b",
    "rollout": "#dddddd", "update": "#54a24b", "broadcast": "#e45756", "evaluation": "#b279a2", "checkpoint": "#9d755d",
}  # fmt: skip


def write_timeline(folder: Path, iteration: int, spans: Sequence[Span]) -> None:
    """Write `timeline/<iteration>.json` and `.png` in the run directory. Gaps in a row are time that it waited."""
    target = folder / "timeline" / f"{iteration:06d}"
    replace_text(target.with_suffix(".json"), json.dumps(chrome_trace(spans)) + "\n")
    picture(spans).save(target.with_suffix(".png"))


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
    """What sort of work it is: unit names begin with it, and reward servers only score."""
    return "score" if span.who.startswith("reward ") else span.what.split("/")[0]


def picture(spans: Sequence[Span]) -> Image.Image:
    """A row for each actor, with the share of the time in which it worked."""
    rows = _by_row(spans)
    start, end = min(span.started for span in spans), max(span.started + span.seconds for span in spans)
    scale = (WIDTH - LABEL - 10) / max(end - start, 1e-9)  # pixels a second
    canvas = Image.new("RGB", (WIDTH, AXIS + ROW * (len(rows) + 2)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (who, row) in enumerate(rows.items()):
        top = AXIS + ROW * number
        busy = sum(span.seconds for span in row) / max(end - start, 1e-9)
        draw.text((4, top + 3), f"{who}  {busy:.0%}", fill="black")
        for span in row:
            left = LABEL + scale * (span.started - start)
            right = max(left + 1, left + scale * span.seconds - 1)  # a pixel between one and the next
            draw.rectangle((left, top + 1, right, top + ROW - 2), fill=COLOURS.get(kind(span), "#999999"))
    _draw_axis(draw, end - start, scale, AXIS + ROW * len(rows))
    for number, (name, colour) in enumerate(COLOURS.items()):
        left, top = LABEL + 100 * number, AXIS + ROW * (len(rows) + 1)
        draw.rectangle((left, top + 3, left + 10, top + 13), fill=colour)
        draw.text((left + 14, top + 2), name, fill="black")
    return canvas


def _draw_axis(draw: ImageDraw.ImageDraw, seconds: float, scale: float, bottom: int) -> None:
    step = 10.0 ** math.floor(math.log10(max(seconds, 1e-3)))
    step = next(step / part for part in (10, 5, 2, 1) if seconds * part / step >= 5)
    for tick in range(int(seconds / step) + 1):
        left = LABEL + scale * tick * step
        draw.line((left, AXIS - 4, left, bottom), fill="#eeeeee")
        draw.text((left, 4), f"{tick * step:g} s", fill="black")


def _by_row(spans: Sequence[Span]) -> dict[str, list[Span]]:
    rows = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.started):
        rows[span.who].append(span)
    order = sorted(rows, key=lambda who: (who == "rollout" or who.startswith("rollout"), who))
    return {who: rows[who] for who in order}
