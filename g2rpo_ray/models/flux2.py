"""FLUX.2 dev: guidance-distilled; latents normalised by the VAE's batch norm, a shift that knows the steps; it edits
several sources, each seen at its own size, up to a megapixel."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL.Image import Image
from torch import Tensor

from g2rpo_ray.models.base import ATTENTION, TEXT_ATTENTION
from g2rpo_ray.models.editing import EditingModel, Layout

SOURCE_AREA = 1024 * 1024  # pixels that a source has at most


class Model(EditingModel):
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
        kind, device, guided = self.pipeline_class, self.device, self.network["guidance_embeds"]
        with torch.device(device):  # a copy to the device would wait for the evaluations before it
            return {
                "guidance": torch.full((n,), self.guidance_scale) if guided else None,
                "txt_ids": kind._prepare_text_ids(text["encoder_hidden_states"][:1]),
                "img_ids": self._with_places(
                    kind._prepare_latent_ids(torch.empty(self._noise_shape(), device="meta")), text
                ),
            }

    def _source_tokens(self, picture: Image) -> tuple[Tensor, tuple[int, int]]:
        processor, patch = self._pipeline.image_processor, 2 * self._scale
        processor.check_image_input(picture)
        picture = processor._resize_if_exceeds_area(picture, self._config.source_area or SOURCE_AREA)
        height, width = picture.height // patch * patch, picture.width // patch * patch
        pixels = processor.preprocess(picture, height=height, width=width, resize_mode="crop")
        latent = self._pipeline._encode_vae_image(pixels.to(self.device, self._dtype), None)
        return self._pack(latent)[0], tuple(latent.shape[2:])

    def _source_places(self, layout: Layout) -> Tensor:
        ids: Tensor = self.pipeline_class._prepare_image_ids([torch.empty(1, 1, *size) for size in layout])
        return ids[0]

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
