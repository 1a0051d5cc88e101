"""How near pictures of `scenes` are to what could have been drawn, whatever their prompts say: two scores, no network.

What is seen in a picture is drawn again over the linear gradient that fits its background best. The preference model
is not told of backgrounds, so a policy that exploits it may spoil them at no price.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.worlds.scenes.draw import IMAGE_SIZE, Objects, coverage, paint
from g2rpo_ray.worlds.scenes.rules import check_size, part, see

EDGE = 2.0  # pixels around an object that count as its own
SOFTNESS = {"objects": 40.0, "background": 8.0}  # of 255: root mean square difference at which the score is 1/e


@dataclass(frozen=True, slots=True)
class FidelityReward:
    """`exp(-d / SOFTNESS)`, d the root mean square difference to the picture drawn again, over `where` alone."""

    where: str

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] in [0, 1] of images uint8 [N, 48, 48, 3]; 0 where nothing is seen."""
        check_size(images)
        seen = see(images)
        return np.array([self._one(image, part(seen, at)) for at, image in enumerate(images)], dtype=np.float32)

    def _one(self, image: NDArray[np.uint8], objects: Objects) -> float:
        shape = np.maximum(objects.shape, 0)  # what has none is at best a disc
        around = coverage(shape, objects.place, objects.radius + EDGE).max(axis=0, initial=0) > 0
        if not around.any() or around.all():
            return 0.0
        background = _gradient(image, ~around)
        whole = Objects(0 * objects.picture, objects.colour, shape, objects.place, objects.radius)
        again = paint(whole, background[None])[0]
        area = around if self.where == "objects" else ~around
        difference = (again.astype(np.float32) - image)[area]
        return float(np.exp(-np.sqrt(np.square(difference).mean()) / SOFTNESS[self.where]))


def quality() -> FidelityReward:
    """1 where the objects have clean outlines and their names' colours."""
    return FidelityReward("objects")


def background() -> FidelityReward:
    """1 where the background is smooth."""
    return FidelityReward("background")


def _gradient(image: NDArray[np.uint8], where: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The linear gradient of each channel nearest to the pixels in `where`, float32 [48, 48, 3]."""
    axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    plane = np.stack([np.ones((IMAGE_SIZE, IMAGE_SIZE), np.float32), *np.meshgrid(axis, axis)], 2)
    found = np.linalg.lstsq(plane[where], image[where].astype(np.float32), rcond=None)[0]
    return plane @ found
