"""Rule-based rewards for moving shapes: the shape moves as its prompt says, and every frame shows it.

From pixels alone; 1 for yes, 0 for no. Foreground and colour are found by the quickstart's rules.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.worlds.quickstart.rules import best_shape, foreground, seen_colour
from g2rpo_ray.worlds.quickstart.shapes import IMAGE_SIZE, templates
from g2rpo_ray.worlds.video_quickstart.draw import DIRECTIONS, MAX_RADIUS, MIN_RADIUS, parse

MIN_TRAVEL = 4.0  # pixels, from the first frame to the last
MAX_SLOPE = 0.5  # pixels aside for a pixel ahead


def seen_direction(video: NDArray[np.uint8]) -> str | None:
    """Where the shape of a video uint8 [F, 32, 32, 3] moves; None if a frame has none, or it moves anywhere else.

    It moves in every frame, by MIN_TRAVEL pixels in all, and aside by at most MAX_SLOPE of that.
    """
    found = [foreground(frame.astype(np.float32)) for frame in video]
    centres = [np.argwhere(each).mean(0)[::-1] for each in found if each is not None]  # to the right, downwards
    if len(centres) != len(video):
        return None
    steps = np.diff(centres, axis=0)
    travel = steps.sum(0)
    for name, ahead in DIRECTIONS.items():
        far, aside = travel @ ahead, abs(travel @ ahead[::-1])
        if far >= MIN_TRAVEL and aside <= MAX_SLOPE * far and (steps @ ahead > 0).all():
            return name
    return None


def seen_shape(frame: NDArray[np.float32]) -> str | None:
    """The shape of a frame [32, 32, 3], wherever it is; None where no template overlaps enough."""
    found = foreground(frame)
    if found is None:
        return None
    places = np.argwhere(found)
    middle = (places.min(0) + places.max(0) + 1) // 2
    return best_shape(np.roll(found, IMAGE_SIZE // 2 - middle, (0, 1)), _templates())


@cache
def _templates() -> NDArray[np.float32]:
    return (templates(1.0, MIN_RADIUS, MAX_RADIUS) > 0.5).astype(np.float32)


class Direction:
    """1 where the shape moves as the prompt says; NaN for a prompt of another world."""

    scope = "video"

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] of videos uint8 [N, F, 32, 32, 3].

        Raises:
            ValueError: there are not two frames, or they have another size.
        """
        if images.ndim != 5 or images.shape[1] < 2 or images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"videos have shape {images.shape}, but motion_direction takes [N, 2 or more, 32, 32, 3]")
        return np.array([self._one(*each) for each in zip(images, prompts, strict=True)], np.float32)

    def _one(self, video: NDArray[np.uint8], prompt: str) -> float:
        try:
            asked = parse(prompt)
        except ValueError:
            return float("nan")
        return float(seen_direction(video) == asked.direction)


class Thing:
    """1 where a frame shows the colour and the shape of the prompt; NaN for a prompt of another world."""

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] of frames uint8 [N, 32, 32, 3]."""
        if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"frames have shape {images.shape}, but motion_thing takes [N, 32, 32, 3]")
        return np.array([self._one(*each) for each in zip(images, prompts, strict=True)], np.float32)

    def _one(self, image: NDArray[np.uint8], prompt: str) -> float:
        try:
            asked = parse(prompt)
        except ValueError:
            return float("nan")
        frame = image.astype(np.float32)
        return float((seen_colour(frame), seen_shape(frame)) == (asked.colour, asked.shape))


def motion_direction() -> Direction:
    """1 where the shape moves as the prompt says."""
    return Direction()


def motion_thing() -> Thing:
    """1 where a frame shows the colour and the shape of the prompt."""
    return Thing()


def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt that is not one of this world."""
    parse(prompt)
