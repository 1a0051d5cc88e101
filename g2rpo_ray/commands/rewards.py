"""Tries every reward of a configuration: loads it, scores images, prints scale, spread, cost and determinism."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2rpo_ray.config import Config, RewardConfig, load_config
from g2rpo_ray.exits import Parser, command, path_option
from g2rpo_ray.messages import number, one_line
from g2rpo_ray.rewards.options import check_reward, has_device, option_defaults, prompt_check
from g2rpo_ray.rewards.pictures import Picture, moving, read_pictures, references
from g2rpo_ray.rewards.registry import KINDS
from g2rpo_ray.rewards.trial import trial
from g2rpo_ray.types import text_of


@dataclass(frozen=True, slots=True)
class Published:
    """Scores that a repository publishes for its images with the default checkpoint."""

    where: str
    values: dict[str, float]  # by `digest_of` the image
    tolerance: float


PUBLISHED = {
    "imagereward": Published(
        "README of THUDM/ImageReward: assets/images, with its prompt beside each as NAME.txt",
        {
            "c8221845a645caae24d9e6702f8897ec71c910cba3b4349d874ce366585c6948": 0.5811622738838196,
            "f8e8f18931894d04157829c926e166abfe235b6f0dd012cc5d3d703fff0d8687": 0.2745276093482971,
            "68ab02f7821169f1a6167b7183f79fd886d8eb53e41cb5cc462135e1597a1a8c": -1.4131819009780884,
            "fe6c1bfe397a4baa132c81f2b2276471f4de914da1375007d861286e5fe0424d": -2.029569625854492,
        },
        0.01,
    ),
}


def check(config: Config, folder: Path | None) -> bool:
    """Prints the results of each reward; returns True if all were tried and nothing is wrong.

    Raises:
        ValueError: one line; the folder has no images.
    """
    size, sources = (config.model.height, config.model.width), config.model.sources
    pictures = read_pictures(folder, sources) if folder else references(*size)
    if config.model.frames > 1:
        pictures = [moving(picture, config.model.frames) for picture in pictures]
    fine = True
    for key, reward in config.rewards_by_key.items():
        try:
            lines = _check_one(key, reward, pictures, config.startup_timeout_s)
            fine &= not any("WRONG" in line for line in lines)
        except ValueError as error:
            fine, lines = False, [f"{key}: not tried: {one_line(error, 600).removeprefix(f'{key}: ')}"]
        print("\n    ".join(lines), flush=True)
    return fine


def _check_one(key: str, reward: RewardConfig, pictures: Sequence[Picture], limit_s: float) -> list[str]:
    """The lines about a reward. ValueError, in one line, if it cannot be tried."""
    check_reward(key, reward)
    fitting = [picture for picture in pictures if _fits(reward, picture)]
    if not fitting:
        raise ValueError(f"none of the images has a prompt that {reward.kind} can score; give IMAGES with such prompts")
    with trial({key: reward}, fitting, limit_s, measured=True) as tried:
        found = tried()[key]
    if "untried" in found:
        raise ValueError(found["untried"])
    options = ({} if reward.kind not in KINDS else option_defaults(reward.kind)) | reward.options
    if reward.kind in KINDS and has_device(reward.kind):
        options = {"device": reward.device} | options
    placed = ", ".join(str(options[name]) for name in ("device", "dtype") if name in options) or "no device"
    gpu = f" and {found['gpu_gib']:.2f} GiB of the GPU" if found["gpu_gib"] else ""
    scores = np.array(found["scores"], np.float32)
    return [
        f"{key}: {reward.kind} on {placed}",
        f"loaded in {found['load_s']:.1f} s; {found['per_s']:.3g} images/s; {found['memory_gib']:.2f} GiB{gpu}",
        _scale(scores, found["group"]),
        "repeated: " + ("the same bits" if found["same"] else "WRONG, other bits, so runs are not reproducible"),
        *([] if found["group"] else [_own_prompts(scores, np.array(found["other"], np.float32))]),
        _published(reward, fitting, scores),
    ]


def _fits(reward: RewardConfig, picture: Picture) -> bool:
    try:
        prompt_check(reward.kind)(text_of(picture.prompt), picture.metadata)
    except ValueError:
        return False
    return True


def _scale(scores: np.ndarray, group: bool) -> str:
    there = scores[np.isfinite(scores)].astype(np.float64)
    if not len(there):
        return f"WRONG: none of {len(scores)} images has a score"
    missing = f", {len(scores) - len(there)} missing" if len(there) < len(scores) else ""
    of = "images as one group" if group else "images"
    return (
        f"{len(scores)} {of}: {there.min():.4f} to {there.max():.4f}, mean {there.mean():.4f}, "
        f"spread (std) {there.std():.4f}{missing}"
    )


def _own_prompts(scores: np.ndarray, other: np.ndarray) -> str:
    gain = (scores - other)[np.isfinite(scores - other)]
    if not len(gain) or not gain.any():
        return "prompts: another image's prompt gives the same score, so it ignores prompts, or cannot score these"
    better = f"{(gain > 0).sum()} of {len(gain)}"
    return f"prompts: {number(float(gain.mean()), '+.4f')} with its own against another's, more for {better}"


def _published(reward: RewardConfig, pictures: Sequence[Picture], scores: np.ndarray) -> str:
    known = PUBLISHED.get(reward.kind)
    if known is None or not _is_published(reward):
        return "published: no value is known for this checkpoint and these images"
    pairs = [
        (float(score), known.values[digest])
        for picture, score in zip(pictures, scores, strict=True)
        if (digest := digest_of(picture)) in known.values
    ]
    if not pairs:
        return f"published: values are known for other images: {known.where}"
    worst = max(abs(score - value) for score, value in pairs)
    verdict = "equal" if worst <= known.tolerance else "WRONG, they differ"
    return (
        f"published: {verdict} within {known.tolerance:g}: {len(pairs)} images, by at most {worst:.4f}; {known.where}"
    )


def _is_published(reward: RewardConfig) -> bool:
    """True if the options leave the published checkpoint."""
    defaults = option_defaults(reward.kind)
    return all(reward.options.get(name, defaults.get(name)) == defaults.get(name) for name in ("checkpoint", "model"))


def digest_of(picture: Picture) -> str:
    """SHA-256 of the prompt and the pixels."""
    return hashlib.sha256(picture.prompt.encode() + picture.image.tobytes()).hexdigest()


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo rewards`."""
    parser = Parser(
        prog="python -m g2rpo_ray.rewards",
        description="Load every reward of a configuration, score images, print scores, speed and memory.",
        epilog="examples:\n"
        "  python -m g2rpo_ray.rewards quickstart\n"
        "  python -m g2rpo_ray.rewards my.yaml pictures/     NAME.png, with the prompt in NAME.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML settings, or the name of a packaged file")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=path_option,
        nargs="?",
        help="a folder of images; default: drawn images",
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Tries the rewards; returns the exit status: 0 all passed, 1 one is wrong or was not tried, 2 invalid input."""
    return 0 if check(load_config(options.config, options.set), options.images) else 1
