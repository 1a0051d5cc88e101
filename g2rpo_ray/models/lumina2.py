"""Lumina-Image 2.0: time from 0 at noise to 1, a system prompt for the prompt alone, guidance rescaled to its norm."""

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL, Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor

from g2rpo_ray.models.base import ATTENTION, FlowModel


class Model(FlowModel):
    pipeline_class, transformer_class, vae_class = Lumina2Pipeline, Lumina2Transformer2DModel, AutoencoderKL
    arguments = (("prompt_embeds", "encoder_hidden_states"), ("prompt_attention_mask", "encoder_attention_mask"))
    lora_targets = ATTENTION

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        encode = self._pipeline.encode_prompt
        found = encode("", True, prompt, **options)[2:] if negative else encode(prompt, False, **options)[:2]
        return {"prompt_embeds": found[0][0], "prompt_attention_mask": found[1][0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        sequence = (self.text_tokens, self.network["cap_feat_dim"])
        return {"prompt_embeds": sequence, "prompt_attention_mask": sequence[:1]}

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        return -super()._predict(x, 1 - sigma, text)

    def _guide(self, v: Tensor, unguided: Tensor, sigma: Tensor) -> Tensor:
        guided = super()._guide(v, unguided, sigma)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
