"""The world of `edit_quickstart`: a shape of the quickstart in a quarter of a picture, and instructions to edit it."""

from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.worlds.quickstart import shapes
from g2rpo_ray.worlds.quickstart.shapes import BACKGROUND, COLOURS, MAX_RADIUS, MAX_SHIFT, MIN_RADIUS, SHAPES

QUARTER = shapes.IMAGE_SIZE  # pixels a side
IMAGE_SIZE = 2 * QUARTER  # the smallest source that FLUX.2 takes
PLACES = ("top left", "top right", "bottom left", "bottom right")
ATTRIBUTES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES, "place": PLACES}
INSTRUCTIONS = {"colour": "make it ", "shape": "make it a ", "place": "move it to the "}

Jitter = tuple[float, float, float]
"""Shift from the middle of the quarter to the right and downwards, and radius, in pixels."""


class Thing(NamedTuple):
    """What a picture shows."""

    colour: str
    shape: str
    place: str


class Edit(NamedTuple):
    """An attribute of a thing and its new value."""

    attribute: str
    value: str

    def __str__(self) -> str:
        return INSTRUCTIONS[self.attribute] + self.value


THINGS = tuple(Thing(*values) for values in product(*ATTRIBUTES.values()))
EDITS = tuple(Edit(attribute, value) for attribute, values in ATTRIBUTES.items() for value in values)
_BY_TEXT = {str(edit): edit for edit in EDITS}


def parse(prompt: str) -> Edit:
    """The edit that an instruction asks for; ValueError for another text."""
    edit = _BY_TEXT.get(" ".join(prompt.lower().split()))
    if edit is None:
        raise ValueError(f"is not an instruction of edit_quickstart, such as {str(EDITS[0])!r}")
    return edit


def edited(thing: Thing, edit: Edit) -> Thing:
    return thing._replace(**{edit.attribute: edit.value})


def draw_jitter(rng: np.random.Generator) -> Jitter:
    shift_x, shift_y = rng.uniform(-MAX_SHIFT, MAX_SHIFT, size=2)
    return shift_x, shift_y, rng.uniform(MIN_RADIUS, MAX_RADIUS)


def draw(thing: Thing, jitter: Jitter) -> NDArray[np.uint8]:
    """A picture, uint8 [64, 64, 3]."""
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    picture[:] = BACKGROUND
    quarters(picture)[PLACES.index(thing.place)][:] = shapes.paint(
        shapes.mask(thing.shape, *jitter), COLOURS[thing.colour]
    )
    return picture


def quarters(picture: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Views of a picture's quarters, in the order of PLACES."""
    return [picture[y : y + QUARTER, x : x + QUARTER] for y in (0, QUARTER) for x in (0, QUARTER)]
