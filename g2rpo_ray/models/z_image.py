"""Z-Image: lists of prompts that are not padded, time from 0 at noise to 1, guidance from the prompt's velocity on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor

from g2rpo_ray.models.base import FlowModel


class Model(FlowModel):
    pipeline_class, transformer_class, vae_class = ZImagePipeline, ZImageTransformer2DModel, AutoencoderKL
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    least_scale = 0.0

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        embeds, _ = self._pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": embeds[0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_tokens, self.network["cap_feat_dim"])}

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        return {"cap_feats": list(columns["prompt_embeds"])}

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        latents = list(x.to(self._dtype).unsqueeze(2).unbind(0))  # a frame each
        output = self.transformer(latents, 1 - sigma, return_dict=False, **text)[0]
        return -torch.stack(output).squeeze(2).float()

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), mu=self._mu(steps))

    def _guide(self, v: Tensor, unguided: Tensor, sigma: Tensor) -> Tensor:
        return v + self.guidance_scale * (v - unguided)
