"""Models whose latents are packed: tokens of 2 x 2 patches of the VAE's latent, [L, D]."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from g2rpo_ray.models.base import FlowModel


class PackedModel(FlowModel):
    """FLUX.1 and models derived from it."""

    def _noise_shape(self) -> tuple[int, ...]:
        return (1, self.network["in_channels"] // 4, self.rows, self.columns)

    def _pack(self, noise: Tensor) -> Tensor:
        packed: Tensor = self.pipeline_class._pack_latents(noise, *noise.shape)
        return packed

    def _unpack(self, x: Tensor) -> Tensor:
        unpack: Any = self.pipeline_class._unpack_latents
        latent: Tensor = unpack(x, self._config.height, self._config.width, self._scale)
        return latent

    def _to_vae(self, x: Tensor) -> Tensor:
        return super()._to_vae(self._unpack(x))

    @cached_property
    def image_ids(self) -> Tensor:
        """Positions of the tokens, always float32, since bfloat16 does not represent all integers above 256."""
        make: Any = self.pipeline_class._prepare_latent_image_ids
        ids: Tensor = make(1, self.rows // 2, self.columns // 2, self.device, torch.float32)
        return ids
