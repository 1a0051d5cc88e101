"""CLIP score: the cosine between an image and its prompt under an open_clip model, by default Apple's DFN-5B ViT-H/14.

Network, tokenizer and preprocessing are open_clip's. Legend: N images and prompts.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer

from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards.features import Scale, check_scale, clip_pixels, cosines, scale_factor
from g2rpo_ray.rewards.files import locate, read_json
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.weights import check_placement, fit_weights, place, read_weights

CHECKPOINT = "apple/DFN5B-CLIP-ViT-H-14:open_clip_pytorch_model.bin"
KEYS = ("embed_dim", "vision_cfg", "text_cfg")
Resize = Literal["squash", "shortest"]
FLOW_GRPO_DIVISOR = 30.0  # of the logits


class CLIPScore:
    """A CLIP from open_clip. `score` is one forward pass."""

    def __init__(
        self, network: Any, architecture: dict[str, Any], squash: bool, scale: str, device: str, dtype: torch.dtype
    ):
        self._factor = scale_factor(scale, network.logit_scale, FLOW_GRPO_DIVISOR)
        self._network = place(network, device, dtype)
        self._tokenizer = SimpleTokenizer(context_length=architecture["text_cfg"].get("context_length", 77))
        self._size: int = architecture["vision_cfg"]["image_size"]
        self._squash, self._device, self._dtype = squash, device, dtype

    @torch.no_grad()
    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scaled cosines float32 [N] of images uint8 [N, H, W, 3] with their prompts; NaN if not finite."""
        check_images("clip", images, prompts)
        pixels = clip_pixels(images, self._size, self._squash).to(device=self._device, dtype=self._dtype)
        tokens = self._tokenizer(list(prompts)).to(self._device)
        return cosines(self._network.encode_image(pixels), self._network.encode_text(tokens)) * self._factor


def build(
    checkpoint: str = CHECKPOINT,
    architecture: str = "ViT-H-14-quickgelu",
    resize: Resize = "squash",
    scale: Scale = "cosine",
    device: str = "cpu",
    dtype: str = "float32",
) -> CLIPScore:
    """The reward from `checkpoint`, a path or a hub file as `repo:file`.

    `architecture` is a name of open_clip's or the path of a JSON file in its format. `resize` makes images square:
    `squash`, as open_clip does for the DFN models, or `shortest`, which resizes the shortest side and crops the centre.
    `scale`: `cosine`, `logits` (times the network's own factor, about 100) or `flow_grpo` (logits divided by 30).
    ValueError, in one line, if an option cannot be used.
    """
    torch_dtype = check_placement(device, dtype)
    if resize not in get_args(Resize):
        raise ValueError(f"resize: {resize!r} given; allowed are {', '.join(get_args(Resize))}; DFN models take squash")
    shape = load_architecture(architecture)
    check_scale(scale)
    try:
        network = open_clip.CLIP(**shape)
    except (TypeError, KeyError) as error:
        raise ValueError(f"architecture: {architecture} is not open_clip's format: {one_line(error)}") from error
    path = locate("checkpoint", checkpoint, CHECKPOINT)
    fit_weights(network, read_weights(path), path, f"architecture {architecture}")
    return CLIPScore(network, shape, resize == "squash", scale, device, torch_dtype)


def load_architecture(architecture: str) -> dict[str, Any]:
    """open_clip's model description by name, or from a JSON file: KEYS, and optionally `quick_gelu`."""
    known: dict[str, Any] | None = open_clip.get_model_config(architecture)
    meaning = f"a name such as ViT-H-14-quickgelu, or a JSON file in open_clip's format ({', '.join(KEYS)})"
    return known if known is not None else read_json("architecture", architecture, KEYS, meaning)
