"""PickScore (arXiv 2305.01569): the cosine under a CLIP ViT-H/14 tuned on the choices of users. Legend: N images.

The paper's table reports the cosine, about .22 to .24; PickScore's own examples multiply it by the logit scale.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from g2rpo_ray.rewards.features import Scale, check_scale, cosines, scale_factor
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.weights import check_placement, place, pretrained

FLOW_GRPO_DIVISOR = 26.0  # of the logits


class PickScore:
    """A CLIP of transformers with its processor. `score` is one forward pass."""

    def __init__(
        self, network: Any, image_processor: Any, tokenizer: Any, scale: str, device: str, dtype: torch.dtype
    ) -> None:
        self._factor = scale_factor(scale, network.logit_scale, FLOW_GRPO_DIVISOR)
        self._network = place(network, device, dtype)
        self._image_processor, self._tokenizer = image_processor, tokenizer
        self._text_length: int = network.config.text_config.max_position_embeddings
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scaled cosines float32 [N] of images uint8 [N, H, W, 3] with their prompts; NaN if not finite."""
        check_images("pickscore", images, prompts)
        pixels = self._image_processor(list(images), input_data_format="channels_last", return_tensors="pt")
        # padded to a fixed length, so that the batch does not change a score
        padding = {"padding": "max_length", "truncation": True, "max_length": self._text_length}
        tokens = self._tokenizer(list(prompts), **padding, return_tensors="pt").to(self._device)
        pixel_values = pixels["pixel_values"].to(device=self._device, dtype=self._dtype)
        image_features = self._network.get_image_features(pixel_values=pixel_values).pooler_output
        return cosines(image_features, self._network.get_text_features(**tokens).pooler_output) * self._factor


def build(
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    scale: Scale = "cosine",
    device: str = "cpu",
    dtype: str = "float32",
) -> PickScore:
    """The reward from `model` and `processor`, each a directory in transformers' format or a hub id.

    `scale`: `cosine`, `logits` (times the network's own factor, about 100) or `flow_grpo` (logits divided by 26,
    near 1). Images are resized by Pillow, as when PickScore was published; transformers' default has changed.
    ValueError, in one line, if an option cannot be used.
    """
    torch_dtype = check_placement(device, dtype)
    check_scale(scale)
    image_processor = pretrained(CLIPImageProcessorPil, "processor", processor)
    tokenizer = pretrained(CLIPTokenizer, "processor", processor)
    network = pretrained(CLIPModel, "model", model, dtype=torch_dtype)
    return PickScore(network, image_processor, tokenizer, scale, device, torch_dtype)
