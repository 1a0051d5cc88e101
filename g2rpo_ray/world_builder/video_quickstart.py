"""`video_quickstart` for the builder: which videos it trains on, and how large and how long trained the model is."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.world_builder.world import Videos, VideoWorld
from g2rpo_ray.worlds.quickstart.shapes import COLOURS, IMAGE_SIZE
from g2rpo_ray.worlds.video_quickstart import draw
from g2rpo_ray.worlds.video_quickstart.draw import DIRECTIONS, FRAMES, SCENES, SHAPES, Scene
from g2rpo_ray.worlds.video_quickstart.rules import Direction, Thing

PER_SCENE = 32  # videos
MISLABELLED = 0.6  # of the pre-training captions name a random direction: what RL puts right


def _is_held_out(scene: Scene) -> bool:
    """A quarter of the pairs of colour and shape: every colour and every shape is in both parts."""
    return (list(COLOURS).index(scene.colour) + SHAPES.index(scene.shape)) % 4 == 0


def _prompts() -> tuple[list[str], list[str]]:
    return (
        [str(scene) for scene in SCENES if not _is_held_out(scene)],
        [str(scene) for scene in SCENES if _is_held_out(scene)],
    )


def _videos() -> tuple[Videos, Tensor]:
    rng = np.random.default_rng(0)
    drawn = np.stack([draw.draw(scene, rng) for scene in SCENES for _ in range(PER_SCENE)])
    return drawn, torch.arange(len(SCENES)).repeat_interleave(PER_SCENE)


def _mislabel(captions: Tensor) -> Tensor:
    """The captions of MISLABELLED of the videos name a random direction, by chance the right one; int64 [N]."""
    others = captions - captions % len(DIRECTIONS) + torch.randint(len(DIRECTIONS), captions.shape)
    return torch.where(torch.rand(len(captions)) < MISLABELLED, others, captions)


def _right(videos: Videos, prompts: Sequence[str]) -> dict[str, float]:
    direction = Direction().score(videos, prompts)
    thing = np.mean([Thing().score(frames, prompts) for frames in videos.swapaxes(0, 1)], axis=0)
    return {
        "direction": float(direction.mean()),
        "thing": float(thing.mean()),
        "all": float((direction * thing).mean()),
    }


WORLD = VideoWorld(
    root=Path(draw.__file__).parent,
    image_size=IMAGE_SIZE,
    frames=FRAMES,
    captions=tuple(map(str, SCENES)),
    tokens=8,
    autoencoder={
        "base_dim": 8, "z_dim": 8, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [True, True],
    },
    text={"width": 32, "heads": 2},
    transformer={"num_layers": 4, "num_attention_heads": 3, "ffn_dim": 192},
    videos=_videos,
    mislabel=_mislabel,
    prompts=_prompts,
    right=_right,
    autoencoder_steps=2500,
    autoencoder_batch=8,
    autoencoder_kl=1e-5,
    transformer_steps=2000,
    transformer_batch=64,
)  # fmt: skip
