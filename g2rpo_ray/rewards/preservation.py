"""How much of a source picture an edit has left as it was: all of it, or what is outside of the prompt's mask.

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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as DINOv2 takes them
Pixels = NDArray[np.uint8]
Likeness = Callable[[Pixels, Pixels], NDArray[np.float32]]
"""How like two images uint8 [H, W, 3] are, place by place: [h, w], 1 where they are the same."""


class Preservation:
    """The mean likeness to the first source, over the places that the mask leaves; each is brought to the size of the
    result."""

    def __init__(self, likeness: Likeness):
        self._likeness = likeness

    def score(
        self, images: Pixels, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        """Scores float32 [N], 1 where nothing has changed, of images uint8 [N, H, W, 3]; NaN where all is masked."""
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
    """1 − the mean difference of the colours, of 0 to 1."""
    difference = np.abs(one.astype(np.float32) - other.astype(np.float32)).mean(-1) / 255
    return np.asarray(1 - difference, np.float32)


def _resized(picture: Pixels, size: Sequence[int]) -> Pixels:
    if picture.shape[:2] == tuple(size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for a prompt without source."""
    if not sources_in(metadata):
        raise ValueError("has no source picture, which preservation compares the result with; set model.sources")


def build() -> Preservation:
    """By pixels: it needs no weights, and sees a shift of one pixel as a change."""
    return Preservation(pixel_likeness)


def build_dino(
    model: str = "facebook/dinov2-small", size: int = 448, dtype: str = "float32", device: str = "cpu"
) -> Preservation:
    """By the cosines of DINOv2's patches, which see what is there more than where its pixels are.

    `size`: S, which both pictures are brought to; a multiple of the network's patch, 14.
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
