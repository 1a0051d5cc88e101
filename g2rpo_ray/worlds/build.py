"""Builds a world's pipeline and preference model: `python -m g2rpo_ray.worlds.build WORLD [--output DIR]`."""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from g2rpo_ray.worlds.measure import report, share_right
from g2rpo_ray.worlds.pipeline import new_pipeline, sample
from g2rpo_ray.worlds.preference import save_preference, train_preference, training_images
from g2rpo_ray.worlds.pretrain import train_autoencoder, train_transformer
from g2rpo_ray.worlds.world import WORLDS, Pictures, World, find_world

LOOKED_AT = 4  # pictures of each held-out prompt
FINISHED_STEPS = (3, 4, 6, 10, 10, 16)  # of the sampler, for the finished pipeline's own pictures


def build_pipeline(world: World, directory: Path) -> tuple[FluxPipeline, Pictures]:
    """Trains and saves the pipeline; also its own pictures, from before, at and after its final form."""
    torch.manual_seed(0)
    pipeline = new_pipeline(world)
    images, caption_index = world.pictures()
    latents = train_autoencoder(pipeline.vae, images, world.autoencoder_steps, world.autoencoder_kl)
    torch.manual_seed(1)
    pictures: list[Pictures] = []

    def watch(step: int, current: FluxPipeline) -> bool:
        if step in world.watched:
            pictures.append(sample(current, world.watched[step], seed=step, steps=6))
        return step in world.looks and _enough(world, current, step)

    train_transformer(world, pipeline, latents, world.mislabel(caption_index), on_step=watch)
    for seed, steps in enumerate(FINISHED_STEPS):
        pictures.append(sample(pipeline, world.finished, seed, steps))
    shutil.rmtree(directory, ignore_errors=True)
    pipeline.to(world.saved).save_pretrained(directory)
    return pipeline.to(torch.float32), np.concatenate(pictures)


def _enough(world: World, pipeline: FluxPipeline, step: int) -> bool:
    """Steps alone do not tell: the same ones with other last bits leave a model some hundred steps behind."""
    _, heldout = world.prompts()
    prompts = heldout * LOOKED_AT
    right = share_right(world, sample(pipeline, prompts, seed=0), prompts)
    print(f"transformer {step}: {right:.3f} of the held-out prompts' pictures are right", flush=True)
    return right >= world.enough


def build(world: World, output: Path) -> None:
    """All of a world's models, into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    for split, prompts in zip(("train", "heldout"), world.prompts(), strict=True):
        (output / f"prompts_{split}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    started = time.monotonic()
    pipeline, generated = build_pipeline(world, output / "pipeline")
    print(f"pipeline built in {time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(2)
    preference = train_preference(world, training_images(world, pipeline.vae, generated))
    save_preference(world, preference, output)
    print(f"all built in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--output", type=Path, help="where to write (default: into the package)")
    given = parser.parse_args()
    world = find_world(given.world)
    build(world, given.output or world.root)
    report(world, given.output or world.root)


if __name__ == "__main__":
    main()
