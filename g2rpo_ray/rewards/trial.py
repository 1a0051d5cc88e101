"""Rewards tried before a run: built, in a process of their own, and asked for scores: of two pictures, a group."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from g2rpo_ray.config import RewardConfig
from g2rpo_ray.rewards.registry import ask, build_reward
from g2rpo_ray.words import one_line


@contextmanager
def trial(
    rewards: Mapping[str, RewardConfig], size: tuple[int, int], prompt: str, metadata: Mapping[str, Any], limit_s: float
) -> Iterator[Callable[[], list[str]]]:
    """Begin to build the rewards, given by their keys, and to score two pictures of [height, width] with each.

    What it yields waits for them: a line for each that could not be tried here; ValueError, in one line, for one that
    cannot be built, gives no scores, ends its process, or needs more than `limit_s` seconds.
    """
    spawning = multiprocessing.get_context("spawn")  # a module that ends or stops its process must not end ours
    here, there = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_try, args=(there, dict(rewards), size, prompt, metadata))
    process.start()
    there.close()  # the end of the process is the end of the pipe
    try:
        yield lambda: _results(rewards, here, process, limit_s)
    finally:
        process.kill()
        process.join()


def _results(rewards: Mapping[str, RewardConfig], answers: Connection, process: Any, limit_s: float) -> list[str]:
    untried = []
    for key in rewards:
        if not answers.poll(limit_s):
            raise ValueError(f"{key}: gave no score within startup_timeout_s={limit_s:g}")
        try:
            wrong, why_not = answers.recv()
        except EOFError:
            process.join()
            reason = f"its process ended with status {process.exitcode} before it gave a score"
            raise ValueError(f"{key}: {reason}") from None
        if wrong:
            raise ValueError(f"{key}: {wrong}")
        untried += [f"{key}: {why_not}"] if why_not else []
    return untried


def _try(
    answers: Connection,
    rewards: Mapping[str, RewardConfig],
    size: tuple[int, int],
    prompt: str,
    metadata: Mapping[str, Any],
) -> None:
    """Send (what is wrong, why it could not be tried) for each reward, "" for nothing."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    for config in rewards.values():
        try:
            answers.send(("", _untried(config, images, prompt, metadata)))
        except (Exception, SystemExit) as error:
            reason = one_line(error)
            answers.send((reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}", ""))


def _untried(config: RewardConfig, images: np.ndarray, prompt: str, metadata: Mapping[str, Any]) -> str:
    if str(config.options.get("device")).startswith("cuda") and not _has_gpu():
        return "not tried, it needs a GPU and there is none here"
    if config.runtime_env:
        return "not tried, it has an environment of its own, which Ray makes"
    score = ask(build_reward(config.kind, **config.options), images, [prompt] * 2, [metadata] * 2)
    return "" if np.isfinite(score).all() else f"gave no score for a picture of noise and the prompt {prompt!r}"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
