"""FLUX.1: guidance-distilled, packed latents, CLIP's pooled embedding beside T5's sequence."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from g2rpo_ray.models.base import FlowModel


class Model(FlowModel):
    pipeline_class, transformer_class, vae_class = FluxPipeline, FluxTransformer2DModel, AutoencoderKL
    arguments = (("prompt_embeds", "encoder_hidden_states"), ("pooled_prompt_embeds", "pooled_projections"))
    once = ("pos_embed",)
    once_a_row = ("context_embedder", "time_text_embed.text_embedder", "time_text_embed.guidance_embedder")

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        # float32 whatever the dtype of the model: positions above 256 are not whole numbers in bfloat16
        ids = self.pipeline_class._prepare_latent_image_ids
        self._image_ids = ids(1, self.rows // 2, self.columns // 2, self._device, torch.float32)

    def _noise_shape(self) -> tuple[int, ...]:
        return (1, self.network["in_channels"] // 4, self.rows, self.columns)

    def _pack(self, noise: Tensor) -> Tensor:
        packed: Tensor = self.pipeline_class._pack_latents(noise, *noise.shape)
        return packed

    def _to_vae(self, x: Tensor) -> Tensor:
        return super()._to_vae(
            self.pipeline_class._unpack_latents(x, self._config.height, self._config.width, self._scale)
        )

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        sequence, pooled, _ = self._pipeline.encode_prompt(prompt, **options)
        return {"prompt_embeds": sequence[0], "pooled_prompt_embeds": pooled[0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (self.text_tokens, self.network["joint_attention_dim"]),
            "pooled_prompt_embeds": (self.network["pooled_projection_dim"],),
        }

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        sequence, device = text["encoder_hidden_states"], self._device
        guided = self.network["guidance_embeds"]
        return {
            "guidance": torch.full((n,), self.guidance_scale, device=device) if guided else None,
            "txt_ids": torch.zeros(sequence.shape[1], 3, device=device),
            "img_ids": self._image_ids,
        }

    def _guides(self) -> bool:
        return False
