"""Chroma: FLUX.1 without CLIP and without distilled guidance; a joint mask that keeps one padding token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from g2rpo_ray.models.packed import PackedModel


class Model(PackedModel):
    pipeline_class, transformer_class, vae_class = ChromaPipeline, ChromaTransformer2DModel, AutoencoderKL
    arguments = (("prompt_embeds", "encoder_hidden_states"), ("prompt_attention_mask", "attention_mask"))
    once, once_a_row = ("pos_embed",), ("context_embedder",)

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        sequence, _, mask, *_ = self._pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": sequence[0], "prompt_attention_mask": mask[0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        sequence = (self.text_tokens, self.network["joint_attention_dim"])
        return {"prompt_embeds": sequence, "prompt_attention_mask": sequence[:1]}

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        text = super()._collate(columns)
        mask = text["attention_mask"]
        return text | {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), self.image_tokens)], dim=1)}

    def enable_gradient_checkpointing(self) -> None:
        def recomputed(block: Any, *given: Any) -> Any:
            # diffusers 0.42 forgets the mask of these blocks where it checkpoints them
            mask = (self._mask,) if isinstance(block, ChromaSingleTransformerBlock) else ()
            return checkpoint(block, *given, *mask, use_reentrant=False)

        self.transformer.enable_gradient_checkpointing(recomputed)

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        self._mask = text["attention_mask"]
        txt_ids = torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=self.device)
        return {"txt_ids": txt_ids, "img_ids": self.image_ids}
