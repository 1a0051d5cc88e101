"""Pictures of several policies side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from g2rpo_ray.analysis.lettering import line
from g2rpo_ray.analysis.video import animation, shown_frames, unstrip
from g2rpo_ray.types import Images, text_of

MIN_TILE = 96  # pixels; smaller pictures are enlarged by a whole factor
CAPTION = 14  # pixels a line


def picture_grid(path: Path, captions: Sequence[str], columns: Mapping[str, Sequence[Images]], frames: int = 1) -> None:
    """Write a PNG: a row of pictures [H, W, 3] for each caption, a column for each policy.

    Args:
        frames: number of frames of a video, whose pictures are strips; above 1, an animated WebP is written, too.
    """
    _canvas(captions, columns).save(path)
    if frames > 1:
        apart = {title: [unstrip(picture, frames) for picture in pictures] for title, pictures in columns.items()}
        moving = [
            _canvas(captions, {title: [parts[at] for parts in strips] for title, strips in apart.items()})
            for at in range(shown_frames(frames))
        ]
        path.with_suffix(".webp").write_bytes(animation(moving))


def _canvas(captions: Sequence[str], columns: Mapping[str, Sequence[Images]]) -> Image.Image:
    assert all(len(pictures) == len(captions) for pictures in columns.values())
    height, width, _ = next(iter(columns.values()))[0].shape
    scale = max(1, math.ceil(MIN_TILE / width))
    tile_height, tile_width = height * scale, width * scale
    canvas = Image.new("RGB", (len(columns) * tile_width, CAPTION + len(captions) * (tile_height + CAPTION)), "white")
    for column, (title, pictures) in enumerate(columns.items()):
        canvas.paste(line(title, tile_width, CAPTION), (column * tile_width, 0))
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((tile_width, tile_height), Image.Resampling.NEAREST)
            canvas.paste(tile, (column * tile_width, CAPTION + row * (tile_height + CAPTION)))
    for row, caption in enumerate(captions, 1):
        canvas.paste(line(text_of(caption), canvas.width, CAPTION), (0, row * (tile_height + CAPTION)))
    return canvas
