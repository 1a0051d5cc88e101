"""How well pictures show scenes, graded: what the preference model of `scenes` is regressed to.

Legend: N pictures, C captions, K objects of a picture (the largest MOST_SEEN).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g2rpo_ray.worlds.scenes.draw import COLOURS, RELATIONS, SHAPES, Kind, Scene
from g2rpo_ray.worlds.scenes.rules import ASIDE, LARGE, see

MOST_SEEN = 7
WEIGHTS = {"colour": 0.4, "shape": 0.4, "size": 0.2}  # of what an object has of what its caption says
ON_THE_WRONG_SIDE = 0.6  # of an object's worth is left there
SUPERFLUOUS = 0.9  # of a picture's worth is left for each object that nobody asked for


def seen_in(images: NDArray[np.uint8]) -> Tensor:
    """Colour, shape, largeness, x and y of each picture's objects, float32 [N, K, 5]; colour -1: no such object."""
    objects, seen = see(images), torch.full((len(images), MOST_SEEN, 5), -1.0)
    filled = np.zeros(len(images), int)
    for row in np.argsort(-objects.radius, kind="stable"):
        at = objects.picture[row]
        if filled[at] < MOST_SEEN:
            large = float(objects.radius[row] > LARGE)
            seen[at, filled[at]] = torch.tensor([objects.colour[row], objects.shape[row], large, *objects.place[row]])
            filled[at] += 1
    return seen


def encode(scenes: Sequence[Scene]) -> Tensor:
    """What captions say, in numbers: int64 [C, 9]: count, colour, shape, large, axis, sign; colour, shape, large."""
    return torch.tensor(
        [
            [scene.number, *_numbers(scene.first), *RELATIONS[scene.relation], *_numbers(scene.second)]
            for scene in scenes
        ]
    )


def _numbers(kind: Kind) -> tuple[int, int, int]:
    return list(COLOURS).index(kind.colour), SHAPES.index(kind.shape), int(kind.size == "large")


def quality(seen: Tensor, said: Tensor) -> Tensor:
    """Float32 [N, C] in [0, 1] of pictures `seen` [N, K, 5] for captions `said` [C, 9].

    Each object that the caption names gets the one seen that suits it best (WEIGHTS), an object of the first kind less
    where it is not on its side of the second; the mean over what is named, for the best of all assignments; less for
    each object beyond as many as are named.
    """
    first = _suits(seen, said[:, 1:4])  # [N, C, K]
    second = _suits(seen, said[:, 6:9])
    place = (
        seen[:, None, :, 3:]
        .expand(-1, len(said), -1, -1)
        .gather(3, said[None, :, None, 4:5].expand(len(seen), -1, MOST_SEEN, -1))[..., 0]
        * said[None, :, 5, None]
    )  # [N, C, K], growing towards the second
    aside = place[..., None, :] - place[..., :, None] >= ASIDE  # [N, C, first, second]
    worth = first[..., None] * torch.where(aside, 1.0, ON_THE_WRONG_SIDE)
    worth = worth.masked_fill(torch.eye(MOST_SEEN, dtype=torch.bool), 0.0).sort(dim=2, descending=True).values
    named = torch.arange(MOST_SEEN) < said[:, :1]  # [C, K]
    total = (worth * named[None, :, :, None]).sum(2) + second  # [N, C, second]
    number = said[None, :, 0] + 1
    superfluous = ((seen[..., 0] >= 0).sum(1, keepdim=True) - number).clamp(min=0)
    return total.amax(2) / number * SUPERFLUOUS**superfluous


def _suits(seen: Tensor, kind: Tensor) -> Tensor:
    """How much each object [N, K, 5] is of each kind [C, 3], [N, C, K]; 0 for none."""
    same = seen[:, None, :, :3] == kind[None, :, None]
    return same.float() @ torch.tensor(list(WEIGHTS.values())) * (seen[:, None, :, 0] >= 0)
