"""SVG figures by matplotlib: small, with reproducible bytes, for light and dark pages."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib is loaded when there is something to draw
    from matplotlib.axes import Axes

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Okabe and Ito's colours, which colour-blind people can distinguish."""
INK, LINES, PAPER = "#1b1f24", "#d8dde3", "#ffffff"
DARK = {INK: "#e6e9ed", LINES: "#3a414a", PAPER: "#171b20"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "g2rpo_ray", "font.family": "sans-serif", "font.size": 9,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": LINES,
    "grid.color": LINES, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True, "axes.formatter.useoffset": False, "figure.facecolor": PAPER,
    "axes.facecolor": PAPER, "text.parse_math": False,
}  # fmt: skip


class Drawing:
    """A figure with one pair of axes; `svg` is set at the end of the context of `drawing`."""

    def __init__(self, axes: "Axes"):
        self.axes = axes
        self.svg = ""


@contextmanager
def drawing(width: float = 4.4, height: float = 2.6) -> Iterator[Drawing]:
    """A context with a figure; width and height in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # its keys are names
        figure = Figure(figsize=(width, height))
        made = Drawing(figure.subplots())
        yield made
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    made.svg = _themed(stream.getvalue())


def _themed(svg: str) -> str:
    """The SVG with colours for the reader's light or dark theme."""
    for number, colour in enumerate(DARK):
        svg = svg.replace(colour, f"var(--c{number})")
    light, dark = (";".join(f"--c{n}:{pair[i]}" for n, pair in enumerate(DARK.items())) for i in (0, 1))
    rules = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}text{{font-family:system-ui,sans-serif}}"
    return re.sub(r"<defs>", f"<style>{rules}</style>\n<defs>", svg, count=1)
