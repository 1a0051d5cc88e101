"""Qwen-Image: prompts that are not padded, guidance rescaled to the norm of the prompt's velocity, a video VAE."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from g2rpo_ray.models.packed import PackedModel
from g2rpo_ray.models.video_vae import VideoVae


class Model(VideoVae, PackedModel):
    pipeline_class: ClassVar[Any] = QwenImagePipeline
    transformer_class: ClassVar[Any] = QwenImageTransformer2DModel
    vae_class: ClassVar[Any] = AutoencoderKLQwenImage
    lora_idle: ClassVar[tuple[str, ...]] = ("attn.add_q_proj", "attn.to_add_out")
    once_a_row: ClassVar[tuple[str, ...]] = ("txt_norm", "txt_in")
    scale_name = "true_cfg_scale"
    template_tokens = 34  # before the prompt: `prompt_template_encode_start_idx` of the pipeline

    @staticmethod
    def vae_scale(autoencoder: Mapping[str, Any]) -> int:
        return 2 ** len(autoencoder["temperal_downsample"])

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        return {"prompt_embeds": self._pipeline.encode_prompt(prompt, **options)[0][0]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_tokens, self.network["joint_attention_dim"])}

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        sequences = list(columns["prompt_embeds"])
        alike = len({len(sequence) for sequence in sequences}) == 1
        mask = None if alike else pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in sequences], True)
        return {"encoder_hidden_states": pad_sequence(sequences, True), "encoder_hidden_states_mask": mask}

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        return {"img_shapes": [[(1, self.rows // 2, self.columns // 2)]] * n}

    def _guide(self, v: Tensor, unguided: Tensor, sigma: Tensor) -> Tensor:
        guided = super()._guide(v, unguided, sigma)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _to_vae(self, x: Tensor) -> Tensor:
        return self._unstandardised(self._unpack(x))
