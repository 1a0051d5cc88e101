"""Stable Diffusion 3 and 3.5 (M, L): two CLIPs and T5; a schedule that the scheduler shifts twice."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from g2rpo_ray.models.base import ATTENTION, TEXT_ATTENTION, FlowModel

CLIP_TOKENS = 77


class Model(FlowModel):
    pipeline_class, transformer_class, vae_class = StableDiffusion3Pipeline, SD3Transformer2DModel, AutoencoderKL
    arguments = (("prompt_embeds", "encoder_hidden_states"), ("pooled_prompt_embeds", "pooled_projections"))
    optional_parts = ("text_encoder_3", "tokenizer_3")
    lora_targets = (*ATTENTION, *TEXT_ATTENTION, *(name.replace("attn", "attn2") for name in ATTENTION))
    lora_idle = ("attn.add_q_proj",)
    once_a_row = ("context_embedder", "time_text_embed.text_embedder")

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        if self._pipeline.transformer is None:  # without T5 the pipeline takes the width of its zeros from there
            self._pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self.network))
        encode = self._pipeline.encode_prompt
        sequence, _, pooled, _ = encode(prompt, None, None, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": sequence[0], "pooled_prompt_embeds": pooled[0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (CLIP_TOKENS + self.text_tokens, self.network["joint_attention_dim"]),
            "pooled_prompt_embeds": (self.network["pooled_projection_dim"],),
        }

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        return super()._predict(x, 1000 * sigma, text)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        # by their number alone: the scheduler takes the ends from its shifted table, and shifts again
        scheduler.set_timesteps(steps, mu=self._mu(steps))
