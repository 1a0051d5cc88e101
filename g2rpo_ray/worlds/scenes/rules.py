"""Rules for the world `scenes`, from pixels alone: what objects a picture shows, and whether its prompt says so.

Every object is brighter than every background, so objects are the connected bright parts of a picture; the colour is
the nearest one, the shape the one whose outline of the same place and area overlaps best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from g2rpo_ray.worlds.scenes.draw import (
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Kind,
    Objects,
    Scene,
    coverage,
    parse,
)

BRIGHT = 130  # a pixel's largest channel: between backgrounds (95) and objects (200), at the middle of a soft edge
LEAST_AREA = 12  # pixels: a third of the smallest object
MIN_OVERLAP = 0.7  # intersection over union with the best shape, below which an object has none
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius in pixels
ASIDE = 3.0  # pixels that a relation needs from centre to centre: half of what the renderer leaves

Rule = Callable[[Objects, Scene], float]


def see(images: NDArray[np.uint8]) -> Objects:
    """The objects in pictures uint8 [N, 48, 48, 3]."""
    bright = images.max(axis=3) > BRIGHT
    parts, number = ndimage.label(bright, structure=_WITHIN_A_PICTURE)
    index = np.arange(1, number + 1)
    area = ndimage.sum_labels(bright, parts, index)
    index = index[area >= LEAST_AREA]
    if not len(index):
        return Objects(
            *(
                np.zeros(shape, kind)
                for shape, kind in ((0, int), (0, int), (0, int), ((0, 2), np.float32), (0, np.float32))
            )
        )
    boxes = ndimage.find_objects(parts)
    picture = np.array([boxes[i - 1][0].start for i in index])
    masks = np.stack([parts[p] == i for p, i in zip(picture, index, strict=True)])  # [O, 48, 48]
    median = np.stack([np.median(images[p][mask], axis=0) for p, mask in zip(picture, masks, strict=True)])
    palette = np.array(list(COLOURS.values()))
    colour = np.linalg.norm(median[:, None] - palette, axis=2).argmin(1)
    return Objects(picture, colour, *_shapes(masks))


_WITHIN_A_PICTURE = np.stack([np.zeros((3, 3), int), np.ones((3, 3), int), np.zeros((3, 3), int)])


def _shapes(masks: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Shape, place and radius of objects that cover `masks` [O, 48, 48]."""
    axis, area = np.arange(IMAGE_SIZE) + 0.5, masks.sum((1, 2))
    centre = np.stack([(masks.sum(1) @ axis) / area, (masks.sum(2) @ axis) / area], 1).astype(np.float32)  # [O, 2]
    overlaps, places, radii = [], [], []
    for shape, (of_area, sunk) in enumerate(_proportions()):
        radius = np.sqrt(area / of_area).astype(np.float32)
        place = centre - radius[:, None] * np.array([0, sunk], np.float32)
        drawn = coverage(np.full(len(masks), shape), place, radius) > 0.5
        overlaps.append((drawn & masks).sum((1, 2)) / (drawn | masks).sum((1, 2)))
        places.append(place)
        radii.append(radius)
    best, row = np.argmax(overlaps, axis=0), np.arange(len(masks))
    known = np.where(np.max(overlaps, axis=0) >= MIN_OVERLAP, best, -1)
    return known, np.stack(places)[best, row], np.stack(radii)[best, row]


def _proportions() -> list[tuple[float, float]]:
    """Area in squared radii, and how many radii the centre of mass is below the place, of each shape."""
    middle, radius = np.full((len(SHAPES), 2), IMAGE_SIZE / 2, np.float32), np.full(len(SHAPES), 15, np.float32)
    drawn = coverage(np.arange(len(SHAPES)), middle, radius)
    below = np.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    return [(float(one.sum()) / 225, float((one.sum(1) @ below) / one.sum() / 15)) for one in drawn]


@dataclass(frozen=True, slots=True)
class SceneReward:
    """What `rule` says of the objects in each picture and its prompt's scene; NaN where the prompt names none."""

    rule: Rule

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] of images uint8 [N, 48, 48, 3]."""
        check_size(images)
        seen = see(images)
        return np.array([self._one(part(seen, at), prompt) for at, prompt in enumerate(prompts)], dtype=np.float32)

    def _one(self, objects: Objects, prompt: str) -> float:
        try:
            scene = parse(prompt)
        except ValueError:
            return float("nan")
        return float(self.rule(objects, scene))


def check_size(images: NDArray[np.uint8]) -> None:
    """ValueError for pictures that cannot be of this world."""
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"images have shape {images.shape}, but the scenes' rewards take [N, 48, 48, 3]")


def part(objects: Objects, picture: int) -> Objects:
    """Those of one picture."""
    of_it = objects.picture == picture
    return Objects(*(getattr(objects, name)[of_it] for name in Objects.__slots__))


def attributes(objects: Objects, scene: Scene) -> bool:
    """Whether there are objects of both colours and shapes, and all of these have the size named."""
    first, second = (_of(objects, kind) for kind in (scene.first, scene.second))
    sized = [
        (objects.radius[of_it] > LARGE) == (kind.size == "large")
        for of_it, kind in zip((first, second), (scene.first, scene.second), strict=True)
    ]
    return bool(first.any() and second.any() and all(one.all() for one in sized))


def relation(objects: Objects, scene: Scene) -> bool:
    """Whether there are objects of both colours and shapes, and all of the first kind are on the side named."""
    first, second = (_of(objects, kind) for kind in (scene.first, scene.second))
    axis, sign = RELATIONS[scene.relation]
    place = sign * objects.place[:, axis]
    return bool(first.any() and second.any() and place[second].min() - place[first].max() >= ASIDE)


def count(objects: Objects, scene: Scene) -> bool:
    """Whether there are as many objects of each colour and shape as named, and no others."""
    first, second = (_of(objects, kind).sum() for kind in (scene.first, scene.second))
    return bool(first == scene.number and second == 1 and len(objects.shape) == scene.number + 1)


def correct(objects: Objects, scene: Scene) -> bool:
    """All three."""
    return attributes(objects, scene) and relation(objects, scene) and count(objects, scene)


def _of(objects: Objects, kind: Kind) -> NDArray[np.bool_]:
    """Which have its colour and shape."""
    return (objects.colour == list(COLOURS).index(kind.colour)) & (objects.shape == SHAPES.index(kind.shape))


def scenes_attributes() -> SceneReward:
    """The reward of rule `attributes`."""
    return SceneReward(attributes)


def scenes_relation() -> SceneReward:
    """The reward of rule `relation`."""
    return SceneReward(relation)


def scenes_count() -> SceneReward:
    """The reward of rule `count`."""
    return SceneReward(count)


def scenes_correct() -> SceneReward:
    """The reward of all three rules."""
    return SceneReward(correct)
