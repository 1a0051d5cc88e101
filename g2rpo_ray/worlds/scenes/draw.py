"""The world `scenes`: one to three coloured shapes beside another one, 48 x 48 pixels, and the caption that names them.

Legend: N pictures, K objects of a picture (at most MOST_OBJECTS), P pixels of a picture (48 * 48).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 48  # pixels a side
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "yellow": (240, 220, 50),
    "green": (40, 200, 70),
    "blue": (60, 90, 240),
    "purple": (190, 60, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (4.6, 5.2), "large": (6.8, 7.4)}  # radius in pixels
COUNTS = ("one", "two", "three")
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # axis; 1 where B has more
DARK = (15.0, 95.0)  # of a background's channel, 0 to 255: every object is brighter
MARGIN = 6.0  # pixels from centre to centre along the axis of the relation, at least
GAP = 3.0  # pixels between objects, as if they were discs
MOST_OBJECTS = len(COUNTS) + 1


class Kind(NamedTuple):
    """A kind of objects."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """What a caption says: objects of the first kind, in a relation to one of the second."""

    number: int  # of the first kind
    first: Kind
    relation: str
    second: Kind


@dataclass(frozen=True, slots=True)
class Objects:
    """Objects of pictures, one row an object: the picture's number, colour, shape, place and radius in pixels."""

    picture: NDArray[np.int64]  # [O]
    colour: NDArray[np.int64]  # [O] in COLOURS
    shape: NDArray[np.int64]  # [O] in SHAPES, -1: none of them
    place: NDArray[np.float32]  # [O, 2] x to the right, y downwards
    radius: NDArray[np.float32]  # [O]


@cache
def all_scenes() -> dict[Scene, int]:
    """Every scene that can be named, 26,496, and its number; the two kinds differ in colour or shape."""
    kinds = [Kind(*kind) for kind in product(SIZES, COLOURS, SHAPES)]
    every = product(range(1, len(COUNTS) + 1), kinds, RELATIONS, kinds)
    named = [Scene(*scene) for scene in every if scene[1][1:] != scene[3][1:]]
    return {scene: number for number, scene in enumerate(named)}


def caption(scene: Scene) -> str:
    """The prompt that names it, as "two small red circles left of one large blue square"."""
    plural = {1: ""}.get(scene.number, "es" if scene.first.shape == "cross" else "s")
    return f"{COUNTS[scene.number - 1]} {' '.join(scene.first)}{plural} {scene.relation} one {' '.join(scene.second)}"


def parse(prompt: str) -> Scene:
    """The scene of a caption; ValueError where `prompt` is none."""
    found = _captions().get(" ".join(prompt.lower().strip(" .").split()))
    if found is None:
        example = caption(next(iter(all_scenes())))
        raise ValueError(f"prompt {prompt!r} names no scene; one is {example!r}")
    return found


@cache
def _captions() -> dict[str, Scene]:
    return {caption(scene): scene for scene in all_scenes()}


def place(scenes: Sequence[Scene], rng: np.random.Generator) -> Objects:
    """Where the objects of true pictures of `scenes` are, and how large, free within what their captions say."""
    colours, rows = list(COLOURS), []
    for picture, scene in enumerate(scenes):
        kinds = [*[scene.first] * scene.number, scene.second]
        for kind, spot in zip(kinds, _spots([kind.size for kind in kinds], scene.relation, rng), strict=True):
            rows.append((picture, colours.index(kind.colour), SHAPES.index(kind.shape), *spot))
    numbers, spots = np.array([row[:3] for row in rows]), np.array([row[3:] for row in rows], np.float32)
    return Objects(numbers[:, 0], numbers[:, 1], numbers[:, 2], spots[:, :2], spots[:, 2])


def _spots(sizes: list[str], relation: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """x, y and radius of objects that do not touch, the last one on its side of all others [K, 3]."""
    axis, sign = RELATIONS[relation]
    tries = 16
    while True:
        radius = np.stack([rng.uniform(*SIZES[size], tries) for size in sizes], 1)  # [tries, K]
        room = IMAGE_SIZE - 2 * radius - 2
        spot = rng.uniform(size=(tries, len(sizes), 2)) * room[..., None] + radius[..., None] + 1
        apart = np.linalg.norm(spot[:, :, None] - spot[:, None], axis=-1) - radius[:, :, None] - radius[:, None] - GAP
        apart[:, np.arange(len(sizes)), np.arange(len(sizes))] = 1
        aside = sign * (spot[:, -1:, axis] - spot[:, :-1, axis]) - MARGIN
        good = np.flatnonzero((apart > 0).all((1, 2)) & (aside > 0).all(1))
        if len(good):
            return np.concatenate([spot[good[0]], radius[good[0], :, None]], 1)
        tries = min(4096, 4 * tries)


def coverage(shape: NDArray[np.int64], place: NDArray[np.float32], radius: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of each pixel each object covers, float32 [O, 48, 48] in [0, 1]: its signed distance, cut to a pixel."""
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    x = np.broadcast_to(axis[None, None] - place[:, 0, None, None], (len(shape), IMAGE_SIZE, IMAGE_SIZE))
    y = np.broadcast_to(axis[None, :, None] - place[:, 1, None, None], x.shape)
    distance = np.empty(x.shape, np.float32)
    for number, name in enumerate(SHAPES):
        of_it = shape == number
        distance[of_it] = _distance(name, x[of_it], y[of_it], radius[of_it, None, None])
    return np.clip(0.5 - distance, 0, 1)


def _distance(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], r: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Signed distance to the outline, pixels; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.87 * r
    if shape == "triangle":  # corners (0, -1.1) and (-1.05, 0.8), (1.05, 0.8) radii
        return np.maximum(y - 0.8 * r, (1.9 * abs(x) - 1.05 * (y + 1.1 * r)) / np.float32(np.hypot(1.9, 1.05)))
    across = np.maximum(abs(x) - 1.05 * r, abs(y) - 0.36 * r)
    return np.minimum(across, np.maximum(abs(x) - 0.36 * r, abs(y) - 1.05 * r))


def backgrounds(number: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Between two dark colours in any direction, float32 [N, 48, 48, 3] in 0 to 255."""
    one, other = rng.uniform(*DARK, (2, number, 1, 1, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, (number, 1, 1, 1)).astype(np.float32)
    axis = np.linspace(-0.5, 0.5, IMAGE_SIZE, dtype=np.float32)
    along = 0.5 + (np.cos(angle) * axis[None, None, :, None] + np.sin(angle) * axis[None, :, None, None]) / np.sqrt(2)
    return one + along.astype(np.float32) * (other - one)


def paint(objects: Objects, background: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The objects over float32 [N, 48, 48, 3], uint8 of that shape."""
    picture, palette = background.copy(), np.array(list(COLOURS.values()), dtype=np.float32)
    covered = coverage(objects.shape, objects.place, objects.radius)[..., None]
    for at, part in zip(objects.picture, range(len(covered)), strict=True):
        picture[at] += covered[part] * (palette[objects.colour[part]] - picture[at])
    return np.round(picture).astype(np.uint8)


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A true picture of each, uint8 [N, 48, 48, 3], places, sizes and background drawn from `rng`."""
    parts = [scenes[start : start + 64] for start in range(0, len(scenes), 64)]  # more do not fit a processor's cache
    return np.concatenate([paint(place(part, rng), backgrounds(len(part), rng)) for part in parts])
