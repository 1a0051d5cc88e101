"""Videos as pictures: some frames side by side, which whatever shows pictures can show, and animations of these."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from g2rpo_ray.types import Images

MAX_SHOWN = 9  # frames of a video, evenly spaced
FRAME_MS = 250


def strip(picture: Images) -> Images:
    """A picture [H, W, 3] as it is; of a video [F, H, W, 3] the frames that are shown, side by side."""
    if picture.ndim == 3:
        return picture
    places = np.linspace(0, len(picture) - 1, shown_frames(len(picture))).round().astype(int)
    return np.concatenate(picture[places], axis=1)


def shown_frames(frames: int) -> int:
    """How many frames a strip has."""
    return min(frames, MAX_SHOWN)


def unstrip(picture: Images, frames: int) -> list[Images]:
    """The pictures in the strip of a video of so many frames."""
    return np.split(picture, shown_frames(frames), axis=1)


def animation(pictures: Sequence[Image.Image]) -> bytes:
    """An animated WebP, which is repeated for ever."""
    stream = io.BytesIO()
    first, *others = pictures
    first.save(stream, "WEBP", quality=80, save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return stream.getvalue()
