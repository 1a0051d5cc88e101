"""Builds an embedded FLUX.2 klein that edits: autoencoder first, then the transformer, by flow matching on edits.

Legend: N pictures, B batch, S tokens of a picture, D channels of a token, T tokens of an instruction, E instructions.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from g2rpo_ray.world_builder.pipeline import SHIFT, learn_merges, to_images, to_pixels
from g2rpo_ray.world_builder.pretrain import faster, fit_autoencoder, fit_transformer, noised
from g2rpo_ray.world_builder.world import EditWorld, Pictures

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
END = "<|endoftext|>"
TEXT_LAYERS = 28  # of the text encoder: FLUX.2 klein reads the 9th, 18th and 27th


def new_editor(world: EditWorld) -> Any:
    """An untrained pipeline of the world's sizes. Its text encoder stays random: what it gives tells words apart."""
    width, heads = world.text["width"], world.text["heads"]
    tokenizer = _tokenizer(world.instructions)
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=heads, num_key_value_heads=1, head_dim=width // heads, tie_word_embeddings=True,
            max_position_embeddings=world.tokens,
        )
    )  # fmt: skip
    text.model.embed_tokens.weight.data.normal_()
    channels = world.autoencoder["latent_channels"]
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            **world.autoencoder, layers_per_block=1, norm_num_groups=4, sample_size=world.image_size,
            mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=text.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=4 * channels, **world.transformer, attention_head_dim=32, joint_attention_dim=3 * width,
            guidance_embeds=False, axes_dims_rope=(8, 8, 8, 8),
        ),
        is_distilled=True,  # it has no classifier-free guidance
    )  # fmt: skip


def _tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE, its merges learnt from the words of `texts`, a token each."""
    words = sorted({("Ġ" if at else "") + word for text in texts for at, word in enumerate(text.split())})
    merges: Any = learn_merges([[*word] for word in words])
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys("".join(pair) for pair in merges), END]
    tokenizer = Qwen2Tokenizer(vocab={piece: at for at, piece in enumerate(pieces)}, merges=merges)
    tokenizer.chat_template = CHAT
    return tokenizer


@torch.no_grad()
def encode_pictures(pipeline: Any, pictures: Pictures) -> Tensor:
    """Tokens [N, S, D] of pictures, as the pipeline encodes sources."""
    some = np.array_split(pictures, len(pictures) // 64 + 1)
    parts = [pipeline._encode_vae_image(to_pixels(part), None) for part in some]
    return pipeline._pack_latents(torch.cat(parts))


@torch.no_grad()
def _normalise(pipeline: Any, pictures: Pictures) -> None:
    """Gives the latents of pictures zero mean and unit deviation, channel by channel."""
    vae = pipeline.vae.requires_grad_(False).eval()
    found = torch.cat([vae.encode(part).latent_dist.mode() for part in to_pixels(pictures).split(64)])
    patches = pipeline._patchify_latents(found)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))


def velocity(pipeline: Any, x: Tensor, sigma: Tensor, source: Tensor, text: Tensor) -> Tensor:
    """Of latents x [B, S, D] with sources [B, S, D] and instructions [B, T, W], as the pipeline evaluates it."""
    side = int(x.shape[1] ** 0.5)
    picture = torch.empty(1, x.shape[2], side, side)
    places = torch.cat([pipeline._prepare_latent_ids(picture), pipeline._prepare_image_ids([picture])], dim=1)
    output: Tensor = pipeline.transformer(
        hidden_states=torch.cat([x, source], 1), timestep=sigma, guidance=None, encoder_hidden_states=text,
        txt_ids=pipeline._prepare_text_ids(text[:1]), img_ids=places, return_dict=False,
    )[0]  # fmt: skip
    return output[:, : x.shape[1]]


@torch.no_grad()
def sample_edits(pipeline: Any, source: Tensor, text: Tensor, seed: int, steps: int = 10) -> Pictures:
    """ODE samples for sources [B, S, D] and instructions [B, T, W]; a call of the pipeline would have one source."""
    number, tokens, channels = source.shape
    side, vae = int(tokens**0.5), pipeline.vae
    noise = torch.randn(number, channels, side, side, generator=torch.Generator().manual_seed(seed))
    x = pipeline._pack_latents(noise)
    grid = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(SHIFT * grid / (1 + (SHIFT - 1) * grid)):
        x = x + (then - now) * velocity(pipeline, x, now.expand(len(x)), source, text)
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    patches = (x * deviation + vae.bn.running_mean).transpose(1, 2).unflatten(2, (side, side))
    some = pipeline._unpatchify_latents(patches).split(64)
    return np.concatenate([to_images(vae.decode(part).sample) for part in some])


def encode_instructions(world: EditWorld, pipeline: Any, texts: Sequence[str]) -> Tensor:
    """[N, T, W], one forward pass each, as the product encodes them."""
    encoded = [pipeline.encode_prompt(text, max_sequence_length=world.tokens)[0] for text in texts]
    return torch.cat(encoded)


def train_editor(world: EditWorld, pipeline: Any, latents: Tensor) -> None:
    """Flow matching from noise to the target of an edit, with its source beside it."""
    with torch.no_grad():
        texts = encode_instructions(world, pipeline, world.instructions)

    def loss() -> Tensor:
        sources, targets, instructions = world.lesson(world.transformer_batch)
        noisy, sigma, target = noised(latents[targets])
        with faster(True):
            v = velocity(pipeline, noisy, sigma, latents[sources], texts[instructions])
        return F.mse_loss(v.float(), target)

    fit_transformer(pipeline.transformer, world.transformer_steps, loss)


@torch.no_grad()
def measure_edits(world: EditWorld, pipeline: Any, seeds: int = 4) -> dict[str, float]:
    """Shares of results on held-out prompts that are right, by rule and of all."""
    sources, texts = world.examples()
    source, text = encode_pictures(pipeline, sources), encode_instructions(world, pipeline, texts)
    found = [world.right(sources, sample_edits(pipeline, source, text, seed), texts) for seed in range(seeds)]
    return {name: float(np.mean([shares[name] for shares in found])) for name in found[0]}


def build_editor(world: EditWorld, output: Path) -> None:
    """The pipeline and the prompts, into `output`."""
    world.prompts(output)
    torch.manual_seed(0)
    pipeline, pictures = new_editor(world), world.pictures()
    fit_autoencoder(pipeline.vae, pictures, world.autoencoder_steps, world.autoencoder_batch, world.autoencoder_kl)
    _normalise(pipeline, pictures[:1024])
    latents = encode_pictures(pipeline, pictures)
    torch.manual_seed(1)
    train_editor(world, pipeline, latents)
    pipeline.save_pretrained(output / "pipeline")
