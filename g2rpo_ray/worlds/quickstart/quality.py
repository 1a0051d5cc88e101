"""How true pictures of shapes are to captions, graded: what the quickstart's preference model is regressed to."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g2rpo_ray.worlds.quickstart.shapes import BACKGROUND, COLOURS, SHAPES, templates

TOLERANCE = 0.02  # relative squared error that any true picture may have: the template grid is half a pixel wide
SOFTNESS = 0.5  # relative squared error beyond it at which the quality is 1/e: about a wrong shape


def quality(images: NDArray[np.uint8]) -> Tensor:
    """How true each image is to each of CAPTIONS, float32 [N, 48] in [0, 1].

    `exp(-(e - TOLERANCE) / SOFTNESS)`, at most 1, `e` the squared distance to the nearest picture that the renderer can
    draw for the caption, relative to the mean of what both have drawn on the background: symmetric, as a cosine between
    pictures has to be.
    """
    background = torch.tensor(BACKGROUND, dtype=torch.float32)
    contrast = torch.tensor([COLOURS[name] for name in COLOURS], dtype=torch.float32) - background  # [8, 3]
    masks = torch.from_numpy(templates())  # [6, K, 1024]
    energy = masks.square().sum(-1) * contrast.square().sum(-1)[:, None, None]  # [8, 6, K]
    parts = []
    for part in torch.from_numpy(images).split(128):
        shown = part.flatten(1, 2) - background  # [n, 1024, 3]
        matched = torch.einsum("npc,kc->nkp", shown, contrast) @ masks.flatten(0, 1).T  # [n, 8, 6 * K]
        drawn = shown.square().sum((1, 2))[:, None, None, None] + energy  # [n, 8, 6, K]
        parts.append((2 - 4 * matched.unflatten(-1, (len(SHAPES), -1)) / drawn).amin(-1).flatten(1))
    return torch.exp(-(torch.cat(parts) - TOLERANCE).clamp(min=0) / SOFTNESS)
