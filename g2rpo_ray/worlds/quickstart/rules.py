"""Rule-based rewards for the quickstart's shapes: does the picture show the colour, the shape, that its prompt names?

From pixels alone, against the renderer's own background and templates; 1 for yes, 0 for no. The foreground is what
differs from the background by more than half of what the shape's own colour does, so soft edges count from the middle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.worlds.quickstart.shapes import BACKGROUND, COLOURS, IMAGE_SIZE, SHAPES, parse, templates

MIN_CONTRAST = 40.0  # RGB distance from the background at which a pixel can belong to a shape
MIN_FOREGROUND = 40  # pixels: less than the smallest shape by half
MIN_OVERLAP = 0.75  # intersection over union with the best template, below which a picture shows no shape at all


@dataclass(frozen=True, slots=True)
class ShapeReward:
    """1 where `judge` says that the picture shows what its prompt names; NaN where the prompt names no such thing."""

    judge: Callable[[NDArray[np.float32], str, str], bool]

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] of images uint8 [N, 32, 32, 3]."""
        if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"images have shape {images.shape}, but the shape rewards take [N, 32, 32, 3]")
        return np.array([self._score_one(*pair) for pair in zip(images, prompts, strict=True)], dtype=np.float32)

    def _score_one(self, image: NDArray[np.uint8], prompt: str) -> float:
        try:
            colour, shape = parse(prompt)
        except ValueError:
            return float("nan")
        return float(self.judge(image.astype(np.float32), colour, shape))


def colour_accuracy() -> ShapeReward:
    """1 where the foreground's colour is nearest to the one that the prompt names."""
    return ShapeReward(lambda image, colour, shape: seen_colour(image) == colour)


def shape_accuracy() -> ShapeReward:
    """1 where the template that overlaps best with the foreground is of the shape that the prompt names."""
    return ShapeReward(lambda image, colour, shape: seen_shape(image) == shape)


def seen_colour(image: NDArray[np.float32]) -> str | None:
    """The named colour nearest to the foreground's, None where there is no foreground; image [32, 32, 3]."""
    found = foreground(image)
    if found is None:
        return None
    colour = np.median(image[found], axis=0)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def seen_shape(image: NDArray[np.float32]) -> str | None:
    """The shape of the best template, None where no template overlaps by MIN_OVERLAP; image [32, 32, 3]."""
    found = foreground(image)
    return None if found is None else best_shape(found, _drawn_templates())


def best_shape(found: NDArray[np.bool_], drawn: NDArray[np.float32]) -> str | None:
    """The shape of the template of `drawn` [6, K, 1024] that overlaps best with a foreground [32, 32]."""
    covered = found.ravel().astype(np.float32)
    intersection = drawn @ covered  # [6, K]
    overlap = (intersection / (drawn.sum(axis=2) + covered.sum() - intersection)).max(axis=1)
    return SHAPES[int(overlap.argmax())] if overlap.max() >= MIN_OVERLAP else None


@cache
def _drawn_templates() -> NDArray[np.float32]:
    return (templates() > 0.5).astype(np.float32)


def foreground(image: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """Where a picture [32, 32, 3] has something in front of the background, [32, 32]; None if that is too little."""
    contrast = np.linalg.norm(image - np.array(BACKGROUND, dtype=np.float32), axis=2)
    inside = contrast > MIN_CONTRAST
    if inside.sum() < MIN_FOREGROUND:
        return None
    found: NDArray[np.bool_] = contrast > max(MIN_CONTRAST, 0.5 * float(np.median(contrast[inside])))
    return found if found.sum() >= MIN_FOREGROUND else None
