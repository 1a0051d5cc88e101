"""A pipeline of each family, small enough for tests: every part real, every weight random, tokenizers made here."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn

from tests.tiny_flux import CHARACTERS, _clip, _clip_tokenizer, _t5, _t5_tokenizer, _vae, write_tiny_flux

WIDTH = 16  # of text embeddings
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
MISTRAL_CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}{% endfor %}"
)


def write_tiny(family: str, directory: str | Path) -> Path:
    """Write a random float32 pipeline of a family (a module of g2rpo_ray.models), the same at every call."""
    if family == "flux":
        return write_tiny_flux(directory)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipeline = BUILDERS[family]()
        randomise(pipeline.transformer, 3.0 if family == "qwen_image" else 1.5)
    pipeline.save_pretrained(directory)
    return Path(directory)


@torch.no_grad()
def randomise(transformer: nn.Module, factor: float) -> None:
    """No weight without effect: what starts at zero, or as it lay in memory, is drawn; matrices are made larger."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token") or (parameter.std() == 0 and parameter.mean() == 0):
            parameter.normal_(0, 0.2)
        elif parameter.ndim > 1:
            parameter *= factor


def _qwen_tokenizer() -> Any:
    letters = [*string.printable.strip(), "Ġ", "Ċ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*letters, *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def _language(kind: Any, layers: int, **more: Any) -> Any:
    return kind(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, **more,
    )  # fmt: skip


def _scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def sd3() -> Any:
    """As SD3.5-M: two attentions in the first block, norms of queries and keys."""
    tokenizer, clips = _clip_tokenizer(), []
    for _ in range(2):
        config = _clip(tokenizer).config
        config.projection_dim, config.num_hidden_layers = WIDTH // 2, 2
        config.hidden_size = WIDTH // 2
        clips.append(transformers.CLIPTextModelWithProjection(config))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    t5_tokenizer = _t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_scheduler(shift=3.0), vae=_vae(), text_encoder=clips[0],
        tokenizer=tokenizer, text_encoder_2=clips[1], tokenizer_2=tokenizer, text_encoder_3=_t5(t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )  # fmt: skip


def qwen_image() -> Any:
    text = {
        "vocab_size": 128, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
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
    return diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=_qwen_tokenizer(), transformer=transformer
    )


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    encoder = transformers.Qwen3Model(_language(transformers.Qwen3Config, 2))
    return diffusers.ZImagePipeline(
        scheduler=_scheduler(shift=3.0), vae=_vae(), text_encoder=encoder, tokenizer=_qwen_tokenizer(),
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
    encoder = transformers.Qwen3ForCausalLM(_language(transformers.Qwen3Config, 28))
    return diffusers.Flux2KleinPipeline(
        **_flux2_parts(False), text_encoder=encoder, tokenizer=_qwen_tokenizer(), is_distilled=is_distilled
    )


def flux2() -> Any:
    text = _language(transformers.MistralConfig, 31)
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    encoder = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision)
    )
    tokenizer = _qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(), tokenizer, chat_template=MISTRAL_CHAT
    )
    return diffusers.Flux2Pipeline(**_flux2_parts(True), text_encoder=encoder, tokenizer=processor)


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    tokenizer = _t5_tokenizer()
    return diffusers.ChromaPipeline(
        scheduler=_scheduler(shift=1.0), vae=_vae(), text_encoder=_t5(tokenizer), tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS, *string.ascii_uppercase, *"<>-.,"]
    tokenizer = transformers.GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)})
    encoder = transformers.Gemma2Model(_language(transformers.Gemma2Config, 2))
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=_scheduler(shift=6.0), vae=_lumina_vae(), text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def _lumina_vae() -> AutoencoderKL:
    """Eight pixels to a latent, which that pipeline takes for granted."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    build.__name__: build for build in (sd3, qwen_image, z_image, flux2_klein, flux2, chroma, lumina2)
}
