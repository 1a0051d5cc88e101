"""Wan 2.1 and 2.2: pictures and videos; a video VAE, time in thousandths, the 5B's for each token.

The A14B of Wan 2.2 has two transformers. The first one, for high noise, has the LoRA; the second one is frozen.

Published pipelines have UniPC as their scheduler. Here a step is Euler's, over a grid with a constant shift.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor

from g2rpo_ray.models.base import FlowModel
from g2rpo_ray.models.video_vae import VideoVae


class Model(VideoVae, FlowModel):
    pipeline_class, transformer_class, vae_class = WanPipeline, WanTransformer3DModel, AutoencoderKLWan
    arguments = (("prompt_embeds", "encoder_hidden_states"),)
    lora_targets = tuple(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0"))
    once_a_row = ("condition_embedder.text_embedder",)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.low_noise = self._pipeline.transformer_2
        second = self._config.guidance_scale_2
        self._low_scale = self.guidance_scale if second is None else second

    @staticmethod
    def vae_scale(autoencoder: Mapping[str, Any]) -> int:
        return int(autoencoder.get("scale_factor_spatial", 8))  # older files lack it, and the next

    @staticmethod
    def vae_frames(autoencoder: Mapping[str, Any]) -> int:
        return int(autoencoder.get("scale_factor_temporal", 4))

    def _noise_shape(self) -> tuple[int, ...]:
        frames = 1 + (self._config.frames - 1) // self.vae_frames(self.autoencoder)
        return (1, self.network["in_channels"], frames, self.rows, self.columns)

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        embeds, _ = self._pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": embeds[0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_tokens, self.network["text_dim"])}

    @property
    def lora_from(self) -> float:
        return self._pipeline.config.boundary_ratio or 0.0

    def _is_high(self, sigma: Tensor) -> Tensor:
        """Whether the first transformer evaluates these noise levels [N], as the pipeline compares them."""
        return 1000 * sigma >= 1000 * self.lora_from

    def _guide(self, v: Tensor, unguided: Tensor, sigma: Tensor) -> Tensor:
        if not self.lora_from:
            return super()._guide(v, unguided, sigma)
        scale = torch.where(self._is_high(sigma), self.guidance_scale, self._low_scale)
        return unguided + scale.view(-1, *[1] * (v.ndim - 1)) * (v - unguided)

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        if self.low_noise is None:
            return self._of_one(self.transformer, x, sigma, text)
        high, v = self._is_high(sigma), torch.empty_like(x)
        for rows, each in ((high, self.transformer), (~high, self.low_noise)):
            if rows.any():
                v[rows] = self._of_one(each, x[rows], sigma[rows], {name: value[rows] for name, value in text.items()})
        return v

    def _of_one(self, network: Any, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        time = 1000 * sigma
        if self._pipeline.config.expand_timesteps:
            _, tall, wide = self.network["patch_size"]
            time = time[:, None].expand(-1, x.shape[2] * (self.rows // tall) * (self.columns // wide))
        return self._output_of(network, x, time, text)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)

    def _to_vae(self, x: Tensor) -> Tensor:
        return self._unstandardised(x)
