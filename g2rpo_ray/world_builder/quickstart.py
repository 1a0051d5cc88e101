"""The quickstart for the builder: which pictures it trains on, and how large and how long trained the models are."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g2rpo_ray.world_builder.world import Judge, Pictures, World
from g2rpo_ray.worlds.quickstart import ROOT
from g2rpo_ray.worlds.quickstart.quality import quality
from g2rpo_ray.worlds.quickstart.shapes import COLOURS, IMAGE_SIZE, SHAPES, caption, parse, render

CAPTIONS = tuple(caption(colour, shape) for colour, shape in product(COLOURS, SHAPES))
MISLABELLED = 0.35  # of the pre-training captions name a random shape, as web captions do: what RL puts right


def _prompts() -> tuple[list[str], list[str]]:
    """A quarter of the pairs is held out: every colour and every shape is in both parts."""
    held = [sum(divmod(at, len(SHAPES))) % 4 == 0 for at in range(len(CAPTIONS))]
    return (
        [text for text, out in zip(CAPTIONS, held, strict=True) if not out],
        [text for text, out in zip(CAPTIONS, held, strict=True) if out],
    )


def rendered_dataset(per_caption: int, seed: int) -> tuple[Pictures, Tensor]:
    """Images uint8 [N, 32, 32, 3] and the index of each one's caption in CAPTIONS, int64 [N]."""
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in product(COLOURS, SHAPES) for _ in range(per_caption)]
    images = np.stack([render(colour, shape, rng) for colour, shape in pairs])
    return images, torch.arange(len(CAPTIONS)).repeat_interleave(per_caption)


def _mislabel(caption_index: Tensor) -> Tensor:
    """The captions of MISLABELLED of the pictures name a random shape (by chance the right one), int64 [N]."""
    random_shape = torch.randint(len(SHAPES), caption_index.shape)
    mislabelled = caption_index - caption_index % len(SHAPES) + random_shape
    return torch.where(torch.rand(len(caption_index)) < MISLABELLED, mislabelled, caption_index)


def _render(prompts: Sequence[str], rng: np.random.Generator) -> Pictures:
    return np.stack([render(*parse(prompt), rng) for prompt in prompts])


def _lesson() -> tuple[Pictures, Tensor]:
    """Half of the partners share the colour, since a picture between two shapes is what a generator gets wrong most."""
    true, _ = rendered_dataset(per_caption=60, seed=1)
    same_colour = torch.arange(len(true)).view(len(COLOURS), -1)
    same_colour = torch.stack([row[torch.randperm(len(row))] for row in same_colour]).flatten()
    anywhere = torch.randperm(len(true))
    return true, torch.where(torch.rand(len(true)) < 0.5, same_colour, anywhere)


def _judge(images: Pictures) -> Judge:
    """Every picture against all captions."""
    everything, targets = torch.arange(len(CAPTIONS)), quality(images)
    return lambda chosen: (everything, targets[chosen])


def _grade(images: Pictures, prompts: Sequence[str]) -> NDArray[np.float32]:
    return quality(images).numpy()[np.arange(len(prompts)), [CAPTIONS.index(prompt) for prompt in prompts]]


WORLD = World(
    root=ROOT,
    image_size=IMAGE_SIZE,
    captions=CAPTIONS,
    tokens=16,  # enough for a caption, and as many as there are image tokens
    autoencoder={"block_out_channels": (16, 32, 32), "latent_channels": 4},
    text={"width": 64, "layers": 1, "heads": 2},
    transformer={"num_layers": 1, "num_single_layers": 3, "num_attention_heads": 3},
    prompts=_prompts,
    pictures=lambda: rendered_dataset(per_caption=200, seed=0),
    mislabel=_mislabel,
    render=_render,
    autoencoder_steps=2000,
    autoencoder_batch=32,
    autoencoder_kl=1e-5,
    transformer_steps=800,
    looks=range(0),
    enough=1.0,
    transformer_batch=64,
    muon=False,
    mixed_precision=False,
    saved=torch.float32,
    watched=dict.fromkeys((250, 350, 450, 550), CAPTIONS * 8),
    finished=CAPTIONS * 12,
    preference={
        "embed_dim": 64,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    preference_steps=3000,
    lesson=_lesson,
    judge=_judge,
    grade=_grade,
    rules=("colour_accuracy", "shape_accuracy"),
    config="embedded:config.yaml",
)
