"""A FLUX pipeline small enough for tests: every part real, every weight random."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from g2rpo_ray.rehearsal.parts import WIDTH, clip, clip_tokenizer, t5, t5_tokenizer

TEXT_DIM = POOLED_DIM = WIDTH
LATENT_CHANNELS = 4
SIZE_MULTIPLE = 4  # pixels: VAE scale factor 2, times the 2 x 2 packing of latents


def write_tiny_flux(directory: str | Path, guidance_embeds: bool = True) -> Path:
    """Write a random float32 FluxPipeline (about 50 thousand parameters) that reads character by character.

    Its weights are the same at every call; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tokenizers = clip_tokenizer(), t5_tokenizer()
        pipeline: Any = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=clip(tokenizers[0], CLIPTextModel, layers=1),
            tokenizer=tokenizers[0],
            text_encoder_2=t5(tokenizers[1]),
            tokenizer_2=tokenizers[1],
            transformer=_transformer(guidance_embeds),
        )
    pipeline.save_pretrained(directory)
    return Path(directory)


def _transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
