"""A pipeline of each family, small enough for tests: every part real, every weight random, tokenizers made here."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from g2rpo_ray.rehearsal.parts import (
    WIDTH,
    clip,
    clip_tokenizer,
    gemma_tokenizer,
    language,
    mistral,
    pixtral_processor,
    qwen3_vl,
    qwen3_vl_processor,
    qwen_tokenizer,
    qwen_vl,
    qwen_vl_processor,
    randomise,
    t5,
    t5_tokenizer,
    umt5,
)  # fmt: skip
from tests.support.tiny_flux import vae, write_tiny_flux


def write_tiny(family: str, directory: str | Path) -> Path:
    """Write a random float32 pipeline of a family (a module of g2rpo_ray.models), the same at every call."""
    if family == "flux":
        return write_tiny_flux(directory)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipeline = BUILDERS[family]()
        sharp = family.startswith(("qwen_image", "wan"))
        for network in filter(None, (pipeline.transformer, getattr(pipeline, "transformer_2", None))):
            randomise(network, 2.0 if family == "sd3" else 3.0 if sharp else 1.5)
    pipeline.save_pretrained(directory)
    return Path(directory)


def _scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def sd3() -> Any:
    """As SD3.5-M: two attentions in the first block, norms of queries and keys."""
    tokenizer = clip_tokenizer()
    clips = [clip(tokenizer, transformers.CLIPTextModelWithProjection, WIDTH // 2) for _ in range(2)]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    words = t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_scheduler(shift=3.0), vae=vae(), text_encoder=clips[0],
        tokenizer=tokenizer, text_encoder_2=clips[1], tokenizer_2=tokenizer, text_encoder_3=t5(words),
        tokenizer_3=words,
    )  # fmt: skip


def _qwen_image_parts() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    encoder = qwen_vl(tokenizer)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.2, 0.8, 1.0, 1.5],
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = _scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
                           shift_terminal=0.02)  # fmt: skip
    return {
        "scheduler": scheduler, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": transformer,
    }  # fmt: skip


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(**_qwen_image_parts())


def qwen_image_edit_plus() -> Any:
    return diffusers.QwenImageEditPlusPipeline(**_qwen_image_parts(), processor=qwen_vl_processor())


def qwen_image_21() -> Any:
    """Its VAE has sixteen pixels to a latent, which that pipeline takes for granted, and an alpha channel."""
    processor = qwen3_vl_processor()
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True, True], latents_mean=[0.1, -0.2, 0.3, 0.0] * 2,
        latents_std=[1.2, 0.8, 1.0, 1.5] * 2,
    )  # fmt: skip
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.QwenImage21Pipeline(
        scheduler=_scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192),
        vae=vae, text_encoder=qwen3_vl(processor), processor=processor, transformer=transformer,
    )  # fmt: skip


def flux_kontext() -> Any:
    with TemporaryDirectory() as folder:
        parts = diffusers.FluxPipeline.from_pretrained(write_tiny_flux(folder)).components
    return diffusers.FluxKontextPipeline(**{name: part for name, part in parts.items() if part is not None})


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    encoder = transformers.Qwen3Model(language(tokenizer, transformers.Qwen3Config))
    return diffusers.ZImagePipeline(
        scheduler=_scheduler(shift=3.0), vae=vae(), text_encoder=encoder, tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip


def _flux2_parts(guidance: bool) -> dict[str, Any]:
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )  # fmt: skip
    scheduler = _scheduler(use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer}


def flux2_klein(is_distilled: bool = False) -> Any:
    tokenizer = qwen_tokenizer()
    encoder = transformers.Qwen3ForCausalLM(language(tokenizer, transformers.Qwen3Config, 28))
    return diffusers.Flux2KleinPipeline(
        **_flux2_parts(False), text_encoder=encoder, tokenizer=tokenizer, is_distilled=is_distilled
    )


def flux2() -> Any:
    processor = pixtral_processor()
    encoder = mistral(processor)
    return diffusers.Flux2Pipeline(**_flux2_parts(True), text_encoder=encoder, tokenizer=processor)


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    return diffusers.ChromaPipeline(
        scheduler=_scheduler(shift=1.0), vae=vae(), text_encoder=t5(tokenizer), tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    tokenizer = gemma_tokenizer()
    encoder = transformers.Gemma2Model(language(tokenizer, transformers.Gemma2Config))
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=_scheduler(shift=6.0), vae=_lumina_vae(), text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def wan(residual: bool = False, shift: float = 3.0, **experts: Any) -> Any:
    """As Wan 2.1, or as Wan 2.2's 5B, which patches pixels in its VAE and has a time for each token."""
    channels = 8
    more = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 4}
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1 * n for n in range(channels)], latents_std=[1 + 0.1 * n for n in range(channels)],
        scale_factor_spatial=16 if residual else 8, **(more if residual else {}),
    )  # fmt: skip
    randomise(vae.decoder, 1.5)
    transformer = _wan_transformer(channels)
    tokenizer = t5_tokenizer()
    return diffusers.WanPipeline(
        transformer=transformer, scheduler=_scheduler(shift=shift), vae=vae, text_encoder=umt5(tokenizer),
        tokenizer=tokenizer, expand_timesteps=residual, **experts,
    )  # fmt: skip


def _wan_transformer(channels: int) -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels, text_dim=WIDTH,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_5b() -> Any:
    return wan(residual=True)


def wan_a14b() -> Any:
    """A network for high noise and another one for low noise. Of ten steps the first five are of high noise."""
    return wan(shift=5.0, transformer_2=_wan_transformer(8), boundary_ratio=0.875)


def _lumina_vae() -> AutoencoderKL:
    """Eight pixels to a latent, which that pipeline takes for granted."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    build.__name__: build
    for build in (
        *(sd3, qwen_image, z_image, flux2_klein, flux2, chroma, lumina2, wan, wan_5b, wan_a14b),
        qwen_image_edit_plus,
        qwen_image_21,
        flux_kontext,
    )
}
