"""DDPO's rewards of file size (arXiv 2305.13301): a small, or a large, JPEG of quality 95."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.rewards.images import check_images, encoded


@dataclass(frozen=True, slots=True)
class FileSize:
    """The size of the JPEG in kB (1000 bytes), times `sign`; prompts are ignored."""

    name: str
    sign: int

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Signed sizes float32 [N] of images uint8 [N, H, W, 3]."""
        check_images(self.name, images, prompts)
        return np.array([self.sign * len(encoded(image, "jpeg")) / 1000 for image in images], dtype=np.float32)


def compressibility() -> FileSize:
    """Minus the size: the smallest file is best."""
    return FileSize("jpeg_compressibility", -1)


def incompressibility() -> FileSize:
    """The size: the largest file is best."""
    return FileSize("jpeg_incompressibility", 1)
