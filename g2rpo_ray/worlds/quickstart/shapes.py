"""The quickstart's world: one coloured shape on dark grey, 32 x 32 pixels, and the caption that names it."""

import math
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

IMAGE_SIZE = 32  # pixels a side
BACKGROUND = (48, 48, 48)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 225, 60),
    "green": (50, 180, 70),
    "cyan": (60, 205, 225),
    "blue": (50, 90, 230),
    "purple": (150, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

MAX_SHIFT = 1.5  # pixels from the centre, each axis
MIN_RADIUS, MAX_RADIUS = 9.0, 11.0  # pixels
_SUPERSAMPLE = 8


def caption(colour: str, shape: str) -> str:
    """The prompt that names this colour and shape."""
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape}"


def parse(prompt: str) -> tuple[str, str]:
    """The one colour and the one shape that `prompt` names; ValueError where it does not name exactly one of each."""
    words = prompt.lower().replace(".", " ").replace(",", " ").split()
    colours = [word for word in words if word in COLOURS]
    shapes = [word for word in words if word in SHAPES]
    if len(colours) != 1 or len(shapes) != 1:
        raise ValueError(
            f"prompt {prompt!r} must name exactly one colour of {', '.join(COLOURS)} "
            f"and one shape of {', '.join(SHAPES)}, as in {caption('red', 'circle')!r}"
        )
    return colours[0], shapes[0]


def mask(shape: str, shift_x: float, shift_y: float, radius: float) -> NDArray[np.float32]:
    """Antialiased coverage in [0, 1], float32 [32, 32]; shift from the image's centre and radius in pixels."""
    side = IMAGE_SIZE * _SUPERSAMPLE
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    centre = (side / 2 + shift_x * _SUPERSAMPLE, side / 2 + shift_y * _SUPERSAMPLE)
    scale = radius * _SUPERSAMPLE
    if shape in ("circle", "ring"):
        draw.ellipse(_box(centre, scale), fill=255)
        if shape == "ring":
            draw.ellipse(_box(centre, 0.55 * scale), fill=0)
    else:
        draw.polygon([(centre[0] + scale * x, centre[1] + scale * y) for x, y in _outline(shape)], fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255)


def paint(coverage: NDArray[np.float32], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """`colour` over the background where `coverage` [32, 32] is 1; uint8 [32, 32, 3]."""
    background = np.array(BACKGROUND, dtype=np.float32)
    blended = background + coverage[..., None] * (np.array(colour, dtype=np.float32) - background)
    return np.round(blended).astype(np.uint8)


def render(colour: str, shape: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A true picture of (colour, shape), uint8 [32, 32, 3], its position and size drawn from `rng`."""
    shift_x, shift_y = rng.uniform(-MAX_SHIFT, MAX_SHIFT, size=2)
    return paint(mask(shape, shift_x, shift_y, rng.uniform(MIN_RADIUS, MAX_RADIUS)), COLOURS[colour])


@cache
def templates(
    shift: float = MAX_SHIFT, min_radius: float = MIN_RADIUS, max_radius: float = MAX_RADIUS
) -> NDArray[np.float32]:
    """Coverage of every shape over a grid of positions and sizes, float32 [6, K, 1024]: by default what `render` draws.

    Args:
        shift: the largest one from the centre, each axis, in pixels.
        min_radius: in pixels, as `max_radius`.
    """
    shifts = np.arange(-shift, shift + 0.1, 0.5)
    radii = np.arange(min_radius, max_radius + 0.1, 0.5)
    grid = list(product(shifts, shifts, radii))
    return np.stack([np.stack([mask(shape, *place).ravel() for place in grid]) for shape in SHAPES])


def _box(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    return centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygon in units of the radius, y downwards."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return [(0.0, -1.0), (1.1, 0.9), (-1.1, 0.9)]
    if shape == "star":
        tips = [(1.2 if k % 2 == 0 else 0.5, math.pi * k / 5) for k in range(10)]
        return [(length * math.sin(angle), 0.1 - length * math.cos(angle)) for length, angle in tips]
    if shape == "cross":
        arm = 0.36
        quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
        return [turned for turns in range(4) for turned in (_turn(point, turns) for point in quarter)]
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def _turn(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = point
    for _ in range(quarters):
        x, y = -y, x
    return x, y
