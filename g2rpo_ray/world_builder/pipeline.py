"""A world's FLUX pipeline, untrained: FLUX.1-dev's parts, each as small as its pictures allow; and sampling from it.

Legend: N images, H and W pixels.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from g2rpo_ray.world_builder.world import Pictures, World

GUIDANCE = 3.5  # the one value that the guidance embedding is trained with
SHIFT = 3.0
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, ..., H, W, 3] to float32 [N, 3, ..., H, W] in [-1, 1]; the frames of videos lie between."""
    return torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """float32 [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def new_pipeline(world: World) -> FluxPipeline:
    """An untrained pipeline of the world's sizes."""
    words = sorted({word for text in world.captions for word in text.split()})
    clip_tokenizer, tokenizer_2 = _clip_tokenizer(words, world.tokens), t5_tokenizer(words, world.tokens)
    width, layers, heads = world.text["width"], world.text["layers"], world.text["heads"]
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            **world.autoencoder,
            norm_num_groups=8,
            sample_size=world.image_size,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=world.tokens,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        ),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=width,
                d_kv=width // heads,
                d_ff=2 * width,
                num_layers=layers,
                num_heads=heads,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=4 * world.autoencoder["latent_channels"],
            **world.transformer,
            attention_head_dim=32,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    )


def sample(pipeline: FluxPipeline, prompts: Sequence[str], seed: int, steps: int = 10) -> Pictures:
    """ODE samples, uint8 [len(prompts), H, W, 3], through the pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    images: NDArray[np.float32] = pipeline(
        prompt=list(prompts),
        height=pipeline.vae.config.sample_size,
        width=pipeline.vae.config.sample_size,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)


def _clip_tokenizer(words: list[str], length: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learnt from `words`; single bytes cover any other one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: Any = learn_merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    pieces = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def learn_merges(spelt: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word, given as its letters, is one piece.

    The library's trainer breaks ties differently in every run.
    """
    merges = []
    while counts := Counter(pair for pieces in spelt for pair in pairwise(pieces)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        spelt = [_merge(pieces, best) for pieces in spelt]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def t5_tokenizer(words: list[str], length: int) -> T5Tokenizer:
    """T5's unigram tokenizer with `words` as its pieces; letters and digits cover any other one.

    `length`: the largest number of tokens.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -4.0) for word in words] + [(letter, -10.0) for letter in ALPHABET]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
