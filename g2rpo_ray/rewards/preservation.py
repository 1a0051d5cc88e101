"""Similarity of an edit's result and its source, over the image or outside the prompt's mask.

Legend: N images and prompts, H, W pixels, S pixels a side of the network's input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.weights import check_placement, place, pretrained
from g2rpo_ray.types import sources_in

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2's normalisation
Pixels = NDArray[np.uint8]
Likeness = Callable[[Pixels, Pixels], NDArray[np.float32]]
"""Similarity of two images uint8 [H, W, 3] by position: float32 [h, w], 1 if equal."""


class Preservation:
    """The reward: mean similarity to the first source outside the mask. Both are resized to the result."""

    def __init__(self, likeness: Likeness):
        self._likeness = likeness

    def score(
        self, images: Pixels, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        """Scores float32 [N], 1 for no change, of images uint8 [N, H, W, 3]; NaN if the mask covers all."""
        check_images("preservation", images, prompts)
        return np.array([self._one(*pair) for pair in zip(images, metadata, strict=True)], np.float32)

    def _one(self, image: Pixels, known: Mapping[str, Any]) -> float:
        source = _resized(sources_in(known)[0], image.shape[:2])
        likeness = self._likeness(image, source)
        if "mask" not in known:
            return float(likeness.mean())
        kept = _resized(known["mask"], likeness.shape).mean(-1) < 128  # white may change
        return float(likeness[kept].mean()) if kept.any() else float("nan")


def pixel_likeness(one: Pixels, other: Pixels) -> NDArray[np.float32]:
    """1 minus the mean difference of the colour channels, each from 0 to 1."""
    difference = np.abs(one.astype(np.float32) - other.astype(np.float32)).mean(-1) / 255
    return np.asarray(1 - difference, np.float32)


def _resized(picture: Pixels, size: Sequence[int]) -> Pixels:
    if picture.shape[:2] == tuple(size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt without source."""
    if not sources_in(metadata):
        raise ValueError("has no source image, which preservation needs; give one, and set model.sources")


def build() -> Preservation:
    """The reward by pixels: it needs no weights, and a shift by one pixel counts as a change."""
    return Preservation(pixel_likeness)


def build_dino(
    model: str = "facebook/dinov2-small", size: int = 448, dtype: str = "float32", device: str = "cpu"
) -> Preservation:
    """The reward by the cosines of DINOv2's patches, which depend on content more than on exact positions.

    Args:
        model: DINOv2, a directory in transformers' format or a hub id.
        size: S, pixels a side of both images for the network; a multiple of its patch, 14.
        dtype: of the network.
        device: of the network.

    Raises:
        ValueError: one line; an option cannot be used.
    """
    from transformers import AutoModel

    kind = check_placement(device, dtype)
    network = place(pretrained(AutoModel, "model", model), device, kind)
    patch = getattr(network.config, "patch_size", 0)
    if not isinstance(patch, int) or patch < 1 or not 0 < size <= 2048 or size % patch:
        raise ValueError(f"size: {size} given; must be a multiple of the patch of {model}, {patch}, up to 2048")
    mean, std = (torch.tensor(part, device=device).view(3, 1, 1) for part in (MEAN, STD))

    @torch.inference_mode()
    def likeness(one: Pixels, other: Pixels) -> NDArray[np.float32]:
        pair = np.stack([_resized(picture, (size, size)) for picture in (one, other)])
        pixels = (torch.tensor(pair, device=device).permute(0, 3, 1, 2) / 255 - mean) / std
        patches = network(pixel_values=pixels.to(kind)).last_hidden_state[:, -((size // patch) ** 2) :].float()
        alike = F.cosine_similarity(patches[0], patches[1], dim=-1)
        return alike.unflatten(0, (size // patch, -1)).cpu().numpy()

    return Preservation(likeness)
