"""Checks and encodes images for rewards. Legend: N images and prompts, H, W pixels."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 95  # DDPO's, and nearly lossless for judges


def check_images(reward: str, images: NDArray[np.uint8], prompts: Sequence[str], videos: bool = False) -> None:
    """Raises ValueError, in one line with the reward's name, unless images are uint8 [N, H, W, 3] with N prompts.

    With `videos` they must be uint8 [N, F, H, W, 3].
    """
    shape = "[N, F, H, W, 3]" if videos else "[N, H, W, 3]"
    known = isinstance(images, np.ndarray) and images.dtype == np.uint8
    if not known or images.ndim != 4 + videos or images.shape[-1] != 3:
        raise ValueError(f"reward {reward}: images are {_given(images)}; expected a numpy array uint8 {shape}")
    if len(prompts) != len(images):
        raise ValueError(f"reward {reward}: {len(prompts)} prompts for {len(images)} images; give one for each")


def encoded(image: NDArray[np.uint8], image_format: str) -> bytes:
    """The bytes of an image uint8 [H, W, 3] as a file, `image_format` "png" or "jpeg"."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, image_format, **({"quality": JPEG_QUALITY} if image_format == "jpeg" else {}))
    return buffer.getvalue()


def _given(images: Any) -> str:
    return f"{images.dtype} {list(images.shape)}" if hasattr(images, "shape") else f"a {type(images).__name__}"
