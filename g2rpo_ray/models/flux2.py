"""FLUX.2 dev: guidance-distilled; latents normalised by the VAE's batch norm, a shift that knows the steps."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from g2rpo_ray.models.base import ATTENTION, TEXT_ATTENTION, FlowModel


class Model(FlowModel):
    pipeline_class: ClassVar[Any] = Flux2Pipeline
    transformer_class, vae_class = Flux2Transformer2DModel, AutoencoderKLFlux2
    arguments = (("prompt_embeds", "encoder_hidden_states"),)
    lora_targets = (*ATTENTION, *TEXT_ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")
    once_a_row = ("context_embedder",)

    def _noise_shape(self) -> tuple[int, ...]:
        return (1, self.network["in_channels"], self.rows // 2, self.columns // 2)

    def _pack(self, noise: Tensor) -> Tensor:
        packed: Tensor = self.pipeline_class._pack_latents(noise)
        return packed

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        return {"prompt_embeds": self._pipeline.encode_prompt(prompt, **options)[0][0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_tokens, self.network["joint_attention_dim"])}

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        kind, device, guided = self.pipeline_class, self._device, self.network["guidance_embeds"]
        return {
            "guidance": torch.full((n,), self.guidance_scale, device=device) if guided else None,
            "txt_ids": kind._prepare_text_ids(text["encoder_hidden_states"][:1]).to(device),
            "img_ids": kind._prepare_latent_ids(torch.empty(self._noise_shape(), device="meta")).to(device),
        }

    def _mu(self, steps: int) -> float:
        return compute_empirical_mu(self.image_tokens, steps)

    def _to_vae(self, x: Tensor) -> Tensor:
        vae = self._pipeline.vae
        mean, var = (part.float().view(1, -1, 1, 1) for part in (vae.bn.running_mean, vae.bn.running_var))
        patches = x.transpose(1, 2).unflatten(2, (self.rows // 2, self.columns // 2))
        latent: Tensor = self.pipeline_class._unpatchify_latents(
            patches * torch.sqrt(var + vae.config.batch_norm_eps) + mean
        )
        return latent

    def _guides(self) -> bool:
        return False
