"""FLUX.1 Kontext: FLUX.1 that edits one source, which it sees at one of seventeen sizes of about a megapixel."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL.Image import Image
from torch import Tensor

from g2rpo_ray.models import flux
from g2rpo_ray.models.editing import EditingModel, Layout


class Model(EditingModel, flux.Model):
    pipeline_class = FluxKontextPipeline
    optional_parts = ("image_encoder", "feature_extractor")
    sources = (0, 1)

    def _source_tokens(self, picture: Image) -> tuple[Tensor, tuple[int, int]]:
        ratio = picture.width / picture.height
        sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(ratio - width / height), width, height) for width, height in sizes)
        processor, patch = self._pipeline.image_processor, 2 * self._scale
        smaller = math.sqrt((self._config.source_area or width * height) / (width * height))
        size = tuple(max(patch, int(side * smaller) // patch * patch) for side in (height, width))
        pixels = processor.preprocess(processor.resize(picture, *size), *size).to(self.device, self._dtype)
        latent = self._pipeline._encode_vae_image(pixels, None)
        rows, columns = latent.shape[2] // 2, latent.shape[3] // 2
        return self._pack(latent)[0], (rows, columns)

    def _source_places(self, layout: Layout) -> Tensor:
        ((rows, columns),) = layout
        ids: Tensor = self.pipeline_class._prepare_latent_image_ids(1, rows, columns, "cpu", torch.int64)
        ids[:, 0] = 1  # the latent's have 0
        return ids

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        others = super()._others(n, text)
        return others | {"img_ids": self._with_places(others["img_ids"], text)}
