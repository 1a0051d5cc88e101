"""The world of `video_quickstart`: a coloured shape moves to one of four sides, in five frames of 32 × 32 pixels."""

from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.worlds.quickstart import shapes
from g2rpo_ray.worlds.quickstart.shapes import COLOURS

FRAMES = 5
SHAPES = ("circle", "square", "triangle", "cross")
"""Those of the quickstart that remain apart when they are small."""
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Steps to the right and downwards."""
TRAVEL = 5.0  # pixels from the centre, before and after
MAX_SHIFT = 1.0  # pixels, each axis
MIN_RADIUS, MAX_RADIUS = 6.5, 7.5  # pixels


class Scene(NamedTuple):
    """What a video shows."""

    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        return f"{shapes.caption(self.colour, self.shape)} moves {self.direction}"


SCENES = tuple(Scene(*values) for values in product(COLOURS, SHAPES, DIRECTIONS))
_BY_TEXT = {str(scene): scene for scene in SCENES}


def parse(prompt: str) -> Scene:
    """The scene that a prompt names; ValueError for another text."""
    scene = _BY_TEXT.get(" ".join(prompt.lower().split()))
    if scene is None:
        raise ValueError(f"is not a prompt of video_quickstart, such as {str(SCENES[0])!r}")
    return scene


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A video, uint8 [5, 32, 32, 3], its position and the shape's size drawn from `rng`."""
    shift_x, shift_y = rng.uniform(-MAX_SHIFT, MAX_SHIFT, size=2)
    radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
    right, down = DIRECTIONS[scene.direction]
    covered = (
        shapes.mask(scene.shape, shift_x + right * way, shift_y + down * way, radius)
        for way in np.linspace(-TRAVEL, TRAVEL, FRAMES)
    )
    return np.stack([shapes.paint(each, COLOURS[scene.colour]) for each in covered])
