"""Qwen-Image-Edit-Plus (2509, 2511): Qwen-Image that edits one source or several; its text encoder sees them, too."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published
from PIL.Image import Image
from torch import Tensor

from g2rpo_ray.models import qwen_image
from g2rpo_ray.models.editing import EditingModel, Layout

LEAST = 32  # pixels of a side, of which the pipeline's are multiples
SEEN_TOKENS = 196  # of a source in the text encoder, about


class Model(EditingModel, qwen_image.Model):
    pipeline_class = QwenImageEditPlusPipeline
    sources = (1, 10)

    def _options(self, sources: Sequence[Image]) -> dict[str, Any]:
        resize, sizes = (
            self._pipeline.image_processor.resize,
            [_size(p, published.CONDITION_IMAGE_SIZE) for p in sources],
        )
        seen = [resize(picture, height, width) for picture, (height, width) in zip(sources, sizes, strict=True)]
        return super()._options(sources) | {"image": seen}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        seen = SEEN_TOKENS * self._config.sources
        return {"prompt_embeds": (self.text_tokens + seen, self.network["joint_attention_dim"])}

    def _source_tokens(self, picture: Image) -> tuple[Tensor, tuple[int, int]]:
        size = _size(picture, self._config.source_area or published.VAE_IMAGE_SIZE)
        pixels = self._pipeline.image_processor.preprocess(picture, *size).unsqueeze(2)  # a frame
        latent = self._pipeline._encode_vae_image(pixels.to(self.device, self._dtype), None).squeeze(2)
        return self._pack(latent)[0], (latent.shape[2] // 2, latent.shape[3] // 2)

    def _source_places(self, layout: Layout) -> Tensor:
        return torch.tensor(layout)

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        places = [rows.tolist() for rows in columns["source_places"]]  # numbers: the transformer reads them on the host
        return super()._collate(columns) | {"source_places": places}

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        own = (1, self.rows // 2, self.columns // 2)
        return {"img_shapes": [[own, *((1, *size) for size in sizes)] for sizes in text["source_places"]]}


def _size(picture: Image, area: int) -> tuple[int, int]:
    """Height and width of a picture that has about so many pixels."""
    width, height = published.calculate_dimensions(area, picture.width / picture.height)
    return max(LEAST, height), max(LEAST, width)
