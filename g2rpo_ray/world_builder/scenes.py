"""`scenes` for the builder: which pictures it trains on, and how large and how long trained the models are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g2rpo_ray.world_builder.world import Judge, Pictures, World
from g2rpo_ray.worlds.scenes import draw
from g2rpo_ray.worlds.scenes.draw import COLOURS, RELATIONS, SHAPES, SIZES, Kind, Scene
from g2rpo_ray.worlds.scenes.quality import encode, quality, seen_in

SCENES = tuple(draw.all_scenes())
TRAIN, HELDOUT = 512, 128  # prompts for RL
VARIANTS = (0, 1, 1, 2)  # words that captions of a picture get wrong, for the preference model


def _prompts() -> tuple[list[str], list[str]]:
    """Captions for RL to train on and held-out ones."""
    order = np.random.default_rng(0).permutation(len(SCENES))[: TRAIN + HELDOUT]
    named = [draw.caption(SCENES[at]) for at in order]
    return named[:TRAIN], named[TRAIN:]


def drawn(number: int, seed: int) -> tuple[Pictures, Tensor]:
    """True pictures of scenes drawn at random, and the numbers of these scenes."""
    rng = np.random.default_rng(seed)
    index = rng.integers(len(SCENES), size=number)
    return draw.render([SCENES[at] for at in index], rng), torch.from_numpy(index)


def _render(prompts: Sequence[str], rng: np.random.Generator) -> Pictures:
    return draw.render([draw.parse(prompt) for prompt in prompts], rng)


def _lesson() -> tuple[Pictures, Tensor]:
    true, _ = drawn(8_000, seed=1)
    return true, torch.randperm(len(true))


def _sampled(number: int, seed: int) -> tuple[str, ...]:
    index = np.random.default_rng(seed).integers(len(SCENES), size=number)
    return tuple(draw.caption(SCENES[at]) for at in index)


def _grade(images: Pictures, prompts: Sequence[str]) -> NDArray[np.float32]:
    said = encode([draw.parse(prompt) for prompt in prompts])
    return np.array(
        [quality(one[None], its[None]).item() for one, its in zip(seen_in(images), said, strict=True)], np.float32
    )


def _judge(images: Pictures) -> Judge:
    """Each picture against captions that are nearly true of those of its batch, and each one against all others'."""
    seen, said, rng = seen_in(images), encode(SCENES), np.random.default_rng(3)
    near = torch.tensor([[_wrong(_named(one, rng), words, rng) for words in VARIANTS] for one in seen.numpy()])

    def judge(chosen: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(VARIANTS), (2, len(chosen)))
        captions = near[chosen].gather(1, rows.T).flatten()
        return captions, quality(seen[chosen], said[captions])

    return judge


def _named(seen: NDArray[np.float32], rng: np.random.Generator) -> Scene:
    """A scene that is true, or nearly so, of what is seen in a picture [K, 5]."""
    whole = [row for row in seen if row[0] >= 0 and row[1] >= 0]
    if len(whole) < 2:
        return SCENES[rng.integers(len(SCENES))]
    first, second = (whole[at] for at in rng.permutation(len(whole))[:2])
    same = sum(bool((row[:2] == first[:2]).all()) for row in whole)
    apart = second[3:] - first[3:]
    axis = int(abs(apart[1]) > abs(apart[0]))
    relation = next(name for name, side in RELATIONS.items() if side == (axis, 1 if apart[axis] > 0 else -1))
    kinds = [Kind(list(SIZES)[int(row[2])], list(COLOURS)[int(row[0])], SHAPES[int(row[1])]) for row in (first, second)]
    return Scene(min(same, 3), kinds[0], relation, kinds[1])


def _wrong(scene: Scene, words: int, rng: np.random.Generator) -> int:
    """The number of a scene that says something else in as many words."""
    while True:
        other = scene
        for part in rng.permutation(5)[:words]:
            other = _changed(other, int(part), rng)
        number = draw.all_scenes().get(other)
        if number is not None:
            return number
        words = max(words, 1)  # two things of one kind have no name


def _changed(scene: Scene, part: int, rng: np.random.Generator) -> Scene:
    if part == 0:
        return scene._replace(number=int(rng.integers(1, 4)))
    if part == 1:
        return scene._replace(relation=list(RELATIONS)[rng.integers(4)])
    which = "first" if rng.random() < 0.5 else "second"
    values = {2: ("size", list(SIZES)), 3: ("colour", list(COLOURS)), 4: ("shape", list(SHAPES))}
    name, allowed = values[part]
    kind = getattr(scene, which)._replace(**{name: allowed[rng.integers(len(allowed))]})
    return scene._replace(**{which: kind})


WORLD = World(
    root=Path(draw.__file__).parent,
    image_size=draw.IMAGE_SIZE,
    captions=tuple(draw.caption(scene) for scene in SCENES),
    tokens=12,
    autoencoder={"block_out_channels": (16, 32, 32), "latent_channels": 6},
    text={"width": 128, "layers": 2, "heads": 4},
    transformer={"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4},
    prompts=_prompts,
    pictures=lambda: drawn(24_000, seed=0),
    mislabel=lambda caption_index: caption_index,
    render=_render,
    autoencoder_steps=800,
    autoencoder_batch=32,
    autoencoder_kl=1e-6,
    transformer_steps=4750,
    looks=range(3000, 4750, 250),
    enough=0.29,
    transformer_batch=64,
    muon=True,
    mixed_precision=True,
    saved=torch.float16,
    watched={step: _sampled(256, seed=step) for step in (500, 1000)},
    finished=_sampled(1024, seed=2),
    preference={
        "embed_dim": 256,
        "vision_cfg": {"image_size": draw.IMAGE_SIZE, "layers": 4, "width": 160, "head_width": 32, "patch_size": 6},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 3},
    },
    preference_steps=2500,
    lesson=_lesson,
    judge=_judge,
    grade=_grade,
    rules=("scenes_attributes", "scenes_relation", "scenes_count"),
    config="embedded:scenes/config.yaml",
)
