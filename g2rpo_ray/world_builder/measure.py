"""Measures a built world: `python -m g2rpo_ray.world_builder.measure WORLD [DIR]` prints sizes, scores, signals."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.world_builder.measure")  # before the imports below, which take seconds

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from g2rpo_ray.config import load_config
from g2rpo_ray.exits import Parser, command, path_option, sigterm_as_interrupt
from g2rpo_ray.local import LocalRun
from g2rpo_ray.rewards import Reward, build_reward
from g2rpo_ray.world_builder.editing import measure_edits
from g2rpo_ray.world_builder.pipeline import sample
from g2rpo_ray.world_builder.video import measure_videos
from g2rpo_ray.world_builder.world import WORLDS, AnyWorld, EditWorld, Pictures, VideoWorld, World, find_world

Scores = NDArray[np.float32]  # [N]
PER_PROMPT = 16
SAMPLING_STEPS = 10
STRIDES = [1, 2, 3, 4, 5, 9]
SIGNAL_PROMPTS = 24
MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2")  # of a pipeline, if it has them


def report(world: AnyWorld, directory: Path) -> None:
    """Prints parameters and bytes, and how right the base's pictures of held-out prompts are.

    Raises:
        ValueError: the directory holds no build.
    """
    parts = ("preference.pt", "preference.json") if isinstance(world, World) else ()
    for part in ("pipeline/model_index.json", *parts):
        if not (directory / part).is_file():
            raise ValueError(f"DIR: {directory} has no {part}; give the --output of a build that has ended")
    pipeline = DiffusionPipeline.from_pretrained(str(directory / "pipeline"), torch_dtype=torch.float32)
    for name in (name for name in MODELS if name in pipeline.components):
        parameters = sum(tensor.numel() for tensor in pipeline.components[name].parameters())
        print(f"{name:16} {parameters:9,} parameters")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{'everything':16} {size / 1e6:9.1f} MB")
    match world:
        case World():
            _report_rewards(world, pipeline, directory)
        case EditWorld():
            _print_right(measure_edits(world, pipeline, seeds=16))
        case VideoWorld():
            _print_right(measure_videos(world, pipeline))


def _print_right(shares: dict[str, float]) -> None:
    print(f"{'held-out base':16} right: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))


def _report_rewards(world: World, pipeline: Any, directory: Path) -> None:
    """Prints every reward's mean over base samples and true renderings, and what RL starts from."""
    preference = {"checkpoint": str(directory / "preference.pt"), "architecture": str(directory / "preference.json")}
    rewards = {"preference": build_reward("hpsv2", **preference)} | {kind: build_reward(kind) for kind in world.rules}
    for split in ("train", "heldout"):
        prompts = (world.root / f"prompts_{split}.txt").read_text().splitlines()[:128] * PER_PROMPT
        base = sample(pipeline, prompts, seed=0, steps=SAMPLING_STEPS)
        scores = _print_means(f"{split} base", base, prompts, rewards)
        _print_agreement(scores["preference"], world.grade(base, prompts))
        _print_means(f"{split} truth", world.render(prompts, np.random.default_rng(0)), prompts, rewards)
    _print_signals(directory, world)


def _print_means(name: str, images: Pictures, prompts: list[str], rewards: dict[str, Reward]) -> dict[str, Scores]:
    scores = {reward: model.score(images, prompts) for reward, model in rewards.items()}
    right = _share_right([scores[kind] for kind in rewards if kind != "preference"])
    means = ", ".join(f"{reward} {score.mean():.3f}" for reward, score in scores.items())
    print(f"{name:16} {means}, all right {right:.3f}", flush=True)
    return scores


def share_right(world: World, images: Pictures, prompts: list[str]) -> float:
    """The share of pictures that all rules call right."""
    return _share_right([build_reward(kind).score(images, prompts) for kind in world.rules])


def _share_right(scores: list[Scores]) -> float:
    return float(np.prod(scores, axis=0).mean())


def _print_agreement(preference: Scores, grade: Scores) -> None:
    """How the preference model judges pictures of one prompt, whose true grades differ."""
    scores, grades = (values.reshape(PER_PROMPT, -1) for values in (preference, grade))
    first, second = np.triu_indices(PER_PROMPT, 1)
    differ = np.abs(grades[first] - grades[second]) > 0.02
    same = np.sign(scores[first] - scores[second]) == np.sign(grades[first] - grades[second])
    print(
        f"{'':16} preference and grade: correlation {np.corrcoef(preference, grade)[0, 1]:.3f}, "
        f"root mean square difference {np.sqrt(np.square(preference - grade).mean()):.3f}, "
        f"order of two pictures right {same[differ].mean():.3f}"
    )


def _print_signals(directory: Path, world: World) -> None:
    """Agreement of granularities and spread within groups, of the base."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"sampler.strides={STRIDES}", f"data.prompts_per_iteration={SIGNAL_PROMPTS}", "eval_rewards={}",
            "iterations=1", f"data.embeddings={folder}", f"model.path={directory / 'pipeline'}",
            f"rewards.preference.options.checkpoint={directory / 'preference.pt'}",
            f"rewards.preference.options.architecture={directory / 'preference.json'}",
        ]  # fmt: skip
        run, start = LocalRun(load_config(world.config, settings)), time.perf_counter()
        metrics = run.step(0)
    cost, seconds = run.sampler.evaluations, time.perf_counter() - start
    print(f"signals of {SIGNAL_PROMPTS} prompts: {cost} evaluations, {seconds:.0f} s with the update")
    for name, value in metrics.items():
        if name.startswith("signal/"):
            print(f"{name:24} {value:.3f}")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m g2rpo_ray.world_builder.measure", description=__doc__)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument(
        "directory", metavar="DIR", type=path_option, nargs="?", help="of a build (default: the package's)"
    )
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Measure; returns the exit status: 0 done, 2 invalid input, 130 interrupted."""
    world = find_world(options.world)
    with sigterm_as_interrupt():
        report(world, options.directory or world.root)
    return 0
