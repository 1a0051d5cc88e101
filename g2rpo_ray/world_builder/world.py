"""What the builder knows of a world: its pictures and captions, and how large and how long trained its models are."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORLDS = ("quickstart", "scenes", "edit_quickstart", "video_quickstart")
Pictures = NDArray[np.uint8]  # [N, S, S, 3], S pixels a side
Videos = NDArray[np.uint8]  # [N, F, S, S, 3], F frames
Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Numbers of pictures [B] to those of captions [C] to compare them with, and how true they are to them [B, C]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One world; N pictures, captions by their number in `captions`."""

    root: Path  # of its files
    image_size: int  # pixels a side
    captions: tuple[str, ...]
    tokens: int  # of text, for a caption and its end
    autoencoder: Mapping[str, Any]  # of AutoencoderKL: block_out_channels, latent_channels
    text: Mapping[str, int]  # of both text encoders: width, layers, heads
    transformer: Mapping[str, int]  # of FluxTransformer2DModel: num_layers, num_single_layers, num_attention_heads

    prompts: Callable[[], tuple[list[str], list[str]]]  # for RL to train on, and held out
    pictures: Callable[[], tuple[Pictures, Tensor]]  # for pre-training, and their captions [N]
    mislabel: Callable[[Tensor], Tensor]  # the captions that pre-training believes [N]
    render: Callable[[Sequence[str], np.random.Generator], Pictures]  # true pictures of captions
    autoencoder_steps: int
    autoencoder_batch: int
    autoencoder_kl: float  # weight of the divergence from normal latents, summed over a picture's
    transformer_steps: int  # at most
    looks: range  # steps at which it is finished if enough of its pictures of held-out prompts are right
    enough: float  # share of them, of 1
    transformer_batch: int
    muon: bool  # for matrices of the transformer and the preference model, in place of AdamW
    mixed_precision: bool  # of training: matrix products in bfloat16, faster where the processor knows it
    saved: torch.dtype  # of the pipeline's weights
    watched: Mapping[
        int, tuple[str, ...]
    ]  # prompts of the malformed pictures that are sampled at steps of pre-training
    finished: tuple[str, ...]  # prompts of those of the finished pipeline, once for each of FINISHED_STEPS

    preference: dict[str, Any]  # the preference model's architecture in open_clip's format
    preference_steps: int
    lesson: Callable[[], tuple[Pictures, Tensor]]  # true pictures for it, and each one's partner to be mixed with [N]
    judge: Callable[[Pictures], Judge]
    grade: Callable[[Pictures, Sequence[str]], NDArray[np.float32]]  # how true pictures are to their own captions [N]
    rules: tuple[str, ...]  # kinds of rewards; a picture is right if all say 1
    config: str  # of a run on it


@dataclass(frozen=True, slots=True, kw_only=True)
class EditWorld:
    """A world of edits for the builder."""

    root: Path  # of its files
    image_size: int  # pixels a side
    instructions: tuple[str, ...]
    tokens: int  # of text, for an instruction
    autoencoder: dict[str, Any]  # of AutoencoderKLFlux2: block_out_channels, latent_channels
    text: dict[str, int]  # of the text encoder: width, heads
    transformer: dict[str, int]  # of Flux2Transformer2DModel: num_layers, num_single_layers, num_attention_heads

    pictures: Callable[[], Pictures]  # for pre-training
    lesson: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    """Of so many edits: numbers of sources and targets in `pictures`, and of instructions, int64 [B] each."""
    prompts: Callable[[Path], None]  # writes prompts_train.jsonl and prompts_heldout.jsonl into a folder
    examples: Callable[[], tuple[Pictures, list[str]]]  # held-out sources and instructions
    right: Callable[[Pictures, Pictures, Sequence[str]], dict[str, float]]
    """Shares of results that are right, by rule and of all, of sources [N], results [N] and instructions."""
    autoencoder_steps: int
    autoencoder_batch: int
    autoencoder_kl: float  # weight of the divergence from normal latents, summed over a picture's
    transformer_steps: int
    transformer_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoWorld:
    """A world of videos for the builder."""

    root: Path  # of its files
    image_size: int  # pixels a side
    frames: int
    captions: tuple[str, ...]
    tokens: int  # of text, for a caption and its end
    autoencoder: dict[str, Any]  # of AutoencoderKLWan: base_dim, z_dim, dim_mult, temperal_downsample, ...
    text: dict[str, int]  # of the text encoder: width, heads
    transformer: dict[str, int]  # of WanTransformer3DModel: num_layers, num_attention_heads, ffn_dim

    videos: Callable[[], tuple[Videos, Tensor]]  # for pre-training, and their captions [N]
    mislabel: Callable[[Tensor], Tensor]  # the captions that pre-training believes [N]
    prompts: Callable[[], tuple[list[str], list[str]]]  # for RL to train on, and held out
    right: Callable[[Videos, Sequence[str]], dict[str, float]]  # shares of videos that are right, by rule and of all
    autoencoder_steps: int
    autoencoder_batch: int
    autoencoder_kl: float  # weight of the divergence from normal latents
    transformer_steps: int
    transformer_batch: int


AnyWorld = World | EditWorld | VideoWorld


def find_world(name: str) -> AnyWorld:
    """The world of that name; a module of its own, `g2rpo_ray.world_builder.NAME`."""
    world: AnyWorld = importlib.import_module(f"{__package__}.{name}").WORLD
    return world
