"""Measures a built world: `python -m g2rpo_ray.worlds.measure WORLD [DIR]` prints sizes, scores and accuracies."""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from g2rpo_ray.rewards import Reward, build_reward
from g2rpo_ray.worlds.pipeline import sample
from g2rpo_ray.worlds.world import WORLDS, Pictures, World, find_world

PER_PROMPT = 16
SAMPLING_STEPS = 10


def report(world: World, directory: Path) -> None:
    """Prints parameters, bytes, and every reward's mean over base samples and true renderings."""
    pipeline = FluxPipeline.from_pretrained(directory / "pipeline", torch_dtype=torch.float32)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        parameters = sum(tensor.numel() for tensor in pipeline.components[name].parameters())
        print(f"{name:16} {parameters:9,} parameters")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{'everything':16} {size / 1e6:9.1f} MB")
    preference = {"checkpoint": str(directory / "preference.pt"), "architecture": str(directory / "preference.json")}
    rewards = {"preference": build_reward("hpsv2", **preference)} | {kind: build_reward(kind) for kind in world.rules}
    for split in ("train", "heldout"):
        prompts = (world.root / f"prompts_{split}.txt").read_text().splitlines() * PER_PROMPT
        _print_means(f"{split} base", sample(pipeline, prompts, seed=0, steps=SAMPLING_STEPS), prompts, rewards)
        _print_means(f"{split} truth", world.render(prompts, np.random.default_rng(0)), prompts, rewards)


def _print_means(name: str, images: Pictures, prompts: list[str], rewards: dict[str, Reward]) -> None:
    scores = {reward: model.score(images, prompts) for reward, model in rewards.items()}
    means = ", ".join(f"{reward} {score.mean():.3f}" for reward, score in scores.items())
    print(f"{name:16} {means}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("directory", type=Path, nargs="?", help="of a build (default: the package's)")
    given = parser.parse_args()
    world = find_world(given.world)
    report(world, given.directory or world.root)


if __name__ == "__main__":
    main()
