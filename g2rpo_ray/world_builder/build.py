"""Builds a world's pipeline and preference model: `python -m g2rpo_ray.world_builder.build WORLD [--output DIR]`."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.world_builder.build")  # before the imports below, which take seconds

import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from g2rpo_ray.exits import Parser, command, path_option, sigterm_as_interrupt
from g2rpo_ray.world_builder.editing import build_editor
from g2rpo_ray.world_builder.measure import report, share_right
from g2rpo_ray.world_builder.pipeline import new_pipeline, sample
from g2rpo_ray.world_builder.preference import save_preference, train_preference, training_images
from g2rpo_ray.world_builder.pretrain import train_autoencoder, train_transformer
from g2rpo_ray.world_builder.video import build_video
from g2rpo_ray.world_builder.world import WORLDS, AnyWorld, EditWorld, Pictures, VideoWorld, World, find_world

ROOM = 64_000_000  # bytes; the files of `scenes` are 11 MB, and their making takes some more
LOOKED_AT = 4  # pictures of each held-out prompt
FINISHED_STEPS = (3, 4, 6, 10, 10, 16)  # of the sampler, for the finished pipeline's own pictures


def build_pipeline(world: World, directory: Path) -> tuple[FluxPipeline, Pictures]:
    """Trains and saves the pipeline; also its own pictures, from before, at and after its final form."""
    torch.manual_seed(0)
    pipeline = new_pipeline(world)
    images, caption_index = world.pictures()
    latents = train_autoencoder(world, pipeline.vae, images)
    torch.manual_seed(1)
    pictures: list[Pictures] = []

    def watch(step: int, current: FluxPipeline) -> bool:
        if step in world.watched:
            pictures.append(sample(current, world.watched[step], seed=step, steps=6))
        return step in world.looks and _enough(world, current, step)

    train_transformer(world, pipeline, latents, world.mislabel(caption_index), on_step=watch)
    for seed, steps in enumerate(FINISHED_STEPS):
        pictures.append(sample(pipeline, world.finished, seed, steps))
    pipeline.to(world.saved).save_pretrained(directory)
    return pipeline.to(torch.float32), np.concatenate(pictures)


def _enough(world: World, pipeline: FluxPipeline, step: int) -> bool:
    """Steps alone do not tell: the same ones with other last bits leave a model some hundred steps behind."""
    _, heldout = world.prompts()
    prompts = heldout * LOOKED_AT
    right = share_right(world, sample(pipeline, prompts, seed=0), prompts)
    print(f"transformer {step}: {right:.3f} of the held-out prompts' pictures are right", flush=True)
    return right >= world.enough


def build(world: AnyWorld, output: Path) -> None:
    """All of a world's models, into `output`, where everything stays as it is until all of it is built.

    Raises:
        ValueError: `output` cannot be written, or has no room.
    """
    with _workspace(output) as folder:
        match world:
            case World():
                _build(world, folder)
            case EditWorld():
                build_editor(world, folder)
            case VideoWorld():
                build_video(world, folder)
        for part in folder.iterdir():
            if part.is_dir():
                shutil.rmtree(output / part.name, ignore_errors=True)
            part.replace(output / part.name)


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """A folder in `output` for this build alone, also where another one builds into the same place."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix="building-", dir=output)
    except OSError as error:
        raise ValueError(f"--output: cannot write to {output}: {error.strerror}; give another directory") from None
    with folder as path:
        free = shutil.disk_usage(path).free
        if free < ROOM:  # said now and not after an hour
            raise ValueError(f"--output: {free / 1e6:.0f} MB are free in {output}; a build needs {ROOM / 1e6:.0f} MB")
        yield Path(path)


def _build(world: World, output: Path) -> None:
    for split, prompts in zip(("train", "heldout"), world.prompts(), strict=True):
        (output / f"prompts_{split}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    started = time.monotonic()
    pipeline, generated = build_pipeline(world, output / "pipeline")
    print(f"pipeline built in {time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(2)
    preference = train_preference(world, training_images(world, pipeline.vae, generated))
    save_preference(world, preference, output)
    print(f"all built in {time.monotonic() - started:.0f} s", flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m g2rpo_ray.world_builder.build", description=__doc__)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--output", metavar="DIR", type=path_option, help="where to write (default: into the package)")
    return parser


@command(make_parser, stopped="stopped: what was under way is not kept")
def main(options: argparse.Namespace) -> int:
    """Build; returns the exit status: 0 done, 2 invalid input, 130 interrupted."""
    world = find_world(options.world)
    output = options.output or world.root
    with sigterm_as_interrupt():
        build(world, output)
        report(world, output)
    return 0
