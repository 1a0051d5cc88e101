"""Measures a built quickstart: `python -m g2rpo_ray.quickstart.measure [DIR]` prints sizes, scores and accuracies."""

import sys
from pathlib import Path

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from numpy.typing import NDArray

from g2rpo_ray.quickstart import (
    HELDOUT_PROMPTS,
    PIPELINE_DIR,
    PREFERENCE_ARCHITECTURE,
    PREFERENCE_CHECKPOINT,
    ROOT,
    TRAIN_PROMPTS,
)
from g2rpo_ray.quickstart.pretrain import sample
from g2rpo_ray.quickstart.shapes import parse, render
from g2rpo_ray.rewards import Reward, build_reward

PER_PROMPT = 16
SAMPLING_STEPS = 10


def report(directory: Path) -> None:
    """Prints parameters, bytes, and every reward's mean over base samples and true renderings."""
    pipeline = FluxPipeline.from_pretrained(directory / PIPELINE_DIR.name)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        parameters = sum(tensor.numel() for tensor in pipeline.components[name].parameters())
        print(f"{name:16} {parameters:9,} parameters")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{'everything':16} {size / 1e6:9.1f} MB")
    rewards = {
        "preference": build_reward(
            "hpsv2",
            checkpoint=str(directory / PREFERENCE_CHECKPOINT.name),
            architecture=str(directory / PREFERENCE_ARCHITECTURE.name),
        ),
        "shape_accuracy": build_reward("shape_accuracy"),
        "colour_accuracy": build_reward("colour_accuracy"),
    }
    for split, path in (("train", TRAIN_PROMPTS), ("held-out", HELDOUT_PROMPTS)):
        prompts = path.read_text().splitlines() * PER_PROMPT
        _print_means(f"{split} base", sample(pipeline, prompts, seed=0, steps=SAMPLING_STEPS), prompts, rewards)
        rng = np.random.default_rng(0)
        truth = np.stack([render(*parse(prompt), rng) for prompt in prompts])
        _print_means(f"{split} truth", truth, prompts, rewards)


def _print_means(name: str, images: NDArray[np.uint8], prompts: list[str], rewards: dict[str, Reward]) -> None:
    scores = {reward: model.score(images, prompts) for reward, model in rewards.items()}
    means = ", ".join(f"{reward} {score.mean():.3f}" for reward, score in scores.items())
    right = scores["shape_accuracy"] * scores["colour_accuracy"]
    print(f"{name:16} {means}, both right {right.mean():.3f}")


if __name__ == "__main__":
    report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
