"""Videos as pictures: frames side by side, and animations."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from g2rpo_ray.types import Images

MAX_SHOWN = 9  # frames of a video, evenly spaced
FRAME_MS = 250


def strip(picture: Images) -> Images:
    """At most MAX_SHOWN frames of a video [F, H, W, 3], side by side; a picture [H, W, 3] is unchanged."""
    if picture.ndim == 3:
        return picture
    places = np.linspace(0, len(picture) - 1, shown_frames(len(picture))).round().astype(int)
    return np.concatenate(picture[places], axis=1)


def shown_frames(frames: int) -> int:
    """Number of frames of a strip."""
    return min(frames, MAX_SHOWN)


def unstrip(picture: Images, frames: int) -> list[Images]:
    """The frames in the strip of a video with `frames` frames."""
    return np.split(picture, shown_frames(frames), axis=1)


def animation(pictures: Sequence[Image.Image]) -> bytes:
    """An animated WebP in an endless loop."""
    stream = io.BytesIO()
    first, *others = pictures
    first.save(stream, "WEBP", quality=80, save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return stream.getvalue()
