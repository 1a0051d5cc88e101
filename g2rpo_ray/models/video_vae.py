"""What families share whose VAE is one of videos: latents [N, C, F, h, w], standardised by channel."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class VideoVae:
    """A part of a family; `FlowModel` has the attributes."""

    _pipeline: Any
    device: str

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of the VAE's latents, [1, C, 1, 1, 1]. Cached: a copy to the device for each batch would wait for it."""
        config = self._pipeline.vae.config
        mean, std = (torch.tensor(each, device=self.device) for each in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def _unstandardised(self, x: Tensor) -> Tensor:
        """Latents as the VAE decodes them."""
        mean, std = self._mean_and_std
        return x * std + mean
