"""Held-out evaluation: scores of the same prompts and seeds under two policies, and pictures of them side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from g2rpo_ray.types import FloatArray, Images
from g2rpo_ray.words import margin, number

SMALLEST_TILE = 96  # pixels: smaller pictures are enlarged by a whole factor, or nobody could see them
CAPTION = 14  # pixels a line
FONT_SIZE = 9


@dataclass(frozen=True, slots=True)
class Comparison:
    """One reward before and after, paired by prompt and seed."""

    before: float
    after: float
    difference: float
    standard_error: float  # of the mean paired difference
    win_rate: float  # pairs that rose, ties half
    pairs: int


def compare(before: FloatArray, after: FloatArray) -> Comparison:
    """Compare scores [prompts, seeds] pair by pair; a pair with a missing score is left out."""
    there = np.isfinite(before) & np.isfinite(after)
    b, a = before[there].astype(np.float64), after[there].astype(np.float64)
    if not len(b):
        return Comparison(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    difference = a - b
    error = float(difference.std(ddof=1)) / math.sqrt(len(b)) if len(b) > 1 else math.nan
    mean_before, mean_after, rise = (float(part.mean()) for part in (b, a, difference))
    return Comparison(mean_before, mean_after, rise, error, win_rate(difference), len(b))


def win_rate(difference: NDArray[Any]) -> float:
    """Share of pairs that rose, ties half; a missing difference (NaN) is no pair, and NaN where there is none."""
    there = difference[np.isfinite(difference)]
    return float((there > 0).mean() + 0.5 * (there == 0).mean()) if len(there) else math.nan


def compare_all(before: Mapping[str, FloatArray], after: Mapping[str, FloatArray]) -> dict[str, dict[str, float]]:
    """The comparison of every reward that both have, as summary.json holds it."""
    return {name: asdict(compare(before[name], after[name])) for name in after if name in before}


def table(comparisons: Mapping[str, Mapping[str, float]], trained: Sequence[str]) -> str:
    """The comparisons as a Markdown table."""
    lines = [
        "| held-out reward | before | after | difference ± s.e. | better | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in comparisons.items():
        label = name + (" (trained)" if name in trained else "")
        lines.append(
            f"| {label} | {number(c['before'])} | {number(c['after'])} | "
            f"{number(c['difference'], '+.4f')}{margin(c['standard_error']) if c['pairs'] else ''} | "
            f"{number(c['win_rate'], '.0%')} | {c['pairs']} |"
        )
    return "\n".join(lines)


def picture_grid(path: Path, captions: Sequence[str], columns: Mapping[str, Sequence[Images]]) -> None:
    """Write a PNG: a row of pictures [H, W, 3] for each caption, a column for each policy."""
    assert all(len(pictures) == len(captions) for pictures in columns.values())
    height, width, _ = next(iter(columns.values()))[0].shape
    scale = max(1, math.ceil(SMALLEST_TILE / width))
    tile_height, tile_width = height * scale, width * scale
    canvas = Image.new("RGB", (len(columns) * tile_width, CAPTION + len(captions) * (tile_height + CAPTION)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.font = _font()
    for column, (title, pictures) in enumerate(columns.items()):
        draw.text((column * tile_width + 2, 1), title, fill="black")
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((tile_width, tile_height), Image.Resampling.NEAREST)
            canvas.paste(tile, (column * tile_width, CAPTION + row * (tile_height + CAPTION)))
    for row, caption in enumerate(captions):
        draw.text((2, CAPTION + row * (tile_height + CAPTION) + tile_height + 1), caption, fill="black")
    canvas.save(path)


def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's: Pillow's own lacks what names of methods have, as G²RPO, and every letter that is not Latin."""
    import matplotlib as mpl

    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE)
