"""FLUX.1: guidance-distilled; CLIP's pooled embedding beside T5's sequence."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from g2rpo_ray.models.packed import PackedModel


class Model(PackedModel):
    pipeline_class: ClassVar[Any] = FluxPipeline
    transformer_class, vae_class = FluxTransformer2DModel, AutoencoderKL
    arguments = (("prompt_embeds", "encoder_hidden_states"), ("pooled_prompt_embeds", "pooled_projections"))
    once = ("pos_embed",)
    once_a_row = ("context_embedder", "time_text_embed.text_embedder", "time_text_embed.guidance_embedder")

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        sequence, pooled, _ = self._pipeline.encode_prompt(prompt, **options)
        return {"prompt_embeds": sequence[0], "pooled_prompt_embeds": pooled[0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (self.text_tokens, self.network["joint_attention_dim"]),
            "pooled_prompt_embeds": (self.network["pooled_projection_dim"],),
        }

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        device, guided = self.device, self.network["guidance_embeds"]
        return {
            "guidance": torch.full((n,), self.guidance_scale, device=device) if guided else None,
            "txt_ids": torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=device),
            "img_ids": self.image_ids,
        }

    def _guides(self) -> bool:
        return False
