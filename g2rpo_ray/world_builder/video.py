"""Builds an embedded Wan 2.1: autoencoder first, then the transformer, by flow matching on videos.

Legend: N videos, B batch, F frames, H and W pixels, C, f, h, w of latents, T tokens of a caption of width D.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from g2rpo_ray.world_builder.pipeline import SHIFT, t5_tokenizer, to_pixels
from g2rpo_ray.world_builder.pretrain import faster, fit_autoencoder, fit_transformer, noised
from g2rpo_ray.world_builder.world import Videos, VideoWorld

CHUNK = 64  # videos that are encoded at once


def new_video_pipeline(world: VideoWorld) -> WanPipeline:
    """An untrained pipeline of the world's sizes. Its text encoder stays random: what it gives tells words apart."""
    width, heads = world.text["width"], world.text["heads"]
    tokenizer = t5_tokenizer(sorted({word for text in world.captions for word in text.split()}), world.tokens)
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=1,
            num_heads=heads, dropout_rate=0.0,
        )
    )  # fmt: skip
    text.shared.weight.data.normal_()
    channels = world.autoencoder["z_dim"]
    stages = world.autoencoder["temperal_downsample"]
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=AutoencoderKLWan(
            **world.autoencoder, latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
            scale_factor_spatial=2 ** len(stages), scale_factor_temporal=2 ** sum(stages),
        ),
        text_encoder=text.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            **world.transformer, attention_head_dim=32, in_channels=channels, out_channels=channels, text_dim=width,
            rope_max_seq_len=32,
        ),
    )  # fmt: skip


@torch.no_grad()
def encode_videos(vae: Any, videos: Videos) -> Tensor:
    """Latents [N, C, f, h, w]; from now on the pipeline gives them zero mean and unit deviation, by channel."""
    vae.requires_grad_(False).eval()
    found = torch.cat([vae.encode(part).latent_dist.mode() for part in to_pixels(videos).split(CHUNK)])
    mean, deviation = found.mean((0, 2, 3, 4)), found.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return (found - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)


def train_video_transformer(world: VideoWorld, pipeline: Any, latents: Tensor, captions: Tensor) -> None:
    """Flow matching from noise to latents [N, C, f, h, w] with captions [N]."""
    with torch.no_grad():
        given = {"do_classifier_free_guidance": False, "max_sequence_length": world.tokens}
        texts = torch.cat([pipeline.encode_prompt(text, **given)[0] for text in world.captions])

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (world.transformer_batch,))
        noisy, sigma, target = noised(latents[chosen])
        with faster(True):
            v = pipeline.transformer(
                hidden_states=noisy,
                timestep=1000 * sigma,
                encoder_hidden_states=texts[captions[chosen]],
                return_dict=False,
            )[0]
        return F.mse_loss(v.float(), target)

    fit_transformer(pipeline.transformer, world.transformer_steps, loss)


def sample_videos(world: VideoWorld, pipeline: Any, prompts: Sequence[str], seed: int) -> Videos:
    """ODE samples of ten steps, uint8 [len(prompts), F, H, W, 3], through the pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    videos = pipeline(
        prompt=list(prompts), height=world.image_size, width=world.image_size, num_frames=world.frames,
        num_inference_steps=10, guidance_scale=1.0, max_sequence_length=world.tokens,
        generator=torch.Generator().manual_seed(seed), output_type="np",
    ).frames  # fmt: skip
    return np.round(videos * 255).astype(np.uint8)


def measure_videos(world: VideoWorld, pipeline: Any, seeds: int = 4) -> dict[str, float]:
    """Shares of videos of held-out prompts that are right, by rule and of all."""
    _, prompts = world.prompts()
    found = [world.right(sample_videos(world, pipeline, prompts, seed), prompts) for seed in range(seeds)]
    return {name: float(np.mean([shares[name] for shares in found])) for name in found[0]}


def build_video(world: VideoWorld, output: Path) -> None:
    """The pipeline and the prompts, into `output`."""
    for split, prompts in zip(("train", "heldout"), world.prompts(), strict=True):
        (output / f"prompts_{split}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    torch.manual_seed(0)
    pipeline: Any = new_video_pipeline(world)
    videos, captions = world.videos()
    fit_autoencoder(pipeline.vae, videos, world.autoencoder_steps, world.autoencoder_batch, world.autoencoder_kl)
    latents = encode_videos(pipeline.vae, videos)
    torch.manual_seed(1)
    train_video_transformer(world, pipeline, latents, world.mislabel(captions))
    pipeline.save_pretrained(output / "pipeline")
