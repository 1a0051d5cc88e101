"""Rewards tried before a run: built and asked for scores of pictures, in a process of their own.

A module that ends or stops its process must not end ours, and what is measured is the memory of these rewards alone.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.config import RewardConfig
from g2rpo_ray.exits import children_ignore_interrupts
from g2rpo_ray.messages import one_line
from g2rpo_ray.numerics import set_up_torch
from g2rpo_ray.rewards.pictures import Picture
from g2rpo_ray.rewards.registry import Reward, ask, open_reward

Found = dict[str, Any]
"""The result of a trial: see `probe`; or `untried`, the reason why it was not tried on this machine."""


@contextmanager
def trial(
    rewards: Mapping[str, RewardConfig], pictures: Sequence[Picture], limit_s: float, measured: bool = False
) -> Iterator[Callable[[], dict[str, Found]]]:
    """Start to build the rewards, given by their keys, and to score the pictures with each.

    What it yields waits for them, and returns what is found of each.

    Args:
        limit_s: seconds that each reward may take.
        measured: see `probe`; a reward is then tried without a GPU, too, as one may have none but by default.

    Raises:
        ValueError: one line; a reward cannot be built, gives no scores, ends its process, or takes too long.
    """
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_try, args=(there, dict(rewards), list(pictures), measured))
    with children_ignore_interrupts():
        process.start()
    there.close()  # the end of the process is the end of the pipe
    try:
        yield lambda: {key: _answer(key, here, process, limit_s) for key in rewards}
    finally:
        process.kill()
        process.join()


def probe(config: RewardConfig, pictures: Sequence[Picture], measured: bool = True) -> Found:
    """Build a reward; its `scores` [N] of the pictures, and whether it compares a `group`.

    `measured`: also the scores with each picture's neighbour's prompt, whether a second time gave the same bits, and
    costs. Of a reward that compares in groups all pictures are one group, of the first one's prompt.
    """
    import torch

    set_up_torch(True, config.threads)
    started = time.perf_counter()
    reward = open_reward(config)
    load_s = time.perf_counter() - started
    together = getattr(reward, "scope", "image") == "group"
    told = [pictures[0]] * len(pictures) if together else list(pictures)
    first = _scores(reward, config, pictures, told)
    found = {"scores": first.tolist(), "group": together}
    if not measured:
        return found
    begun = time.perf_counter()
    again = _scores(reward, config, pictures, told)
    seconds = time.perf_counter() - begun
    other = first if together else _scores(reward, config, pictures, [*told[1:], told[0]])
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    return found | {
        "other": other.tolist(),
        "same": first.tobytes() == again.tobytes(),
        "load_s": load_s,
        "per_s": len(pictures) / seconds,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gpu_gib": on_gpu / 2**30 if on_gpu else None,
    }


def _answer(key: str, answers: Connection, process: Any, limit_s: float) -> Found:
    if not answers.poll(limit_s):
        raise ValueError(f"{key}: gave no score within startup_timeout_s={limit_s:g}")
    try:
        found: Found = answers.recv()
    except EOFError:
        process.join()
        reason = f"its process ended with status {process.exitcode} before it gave a score"
        raise ValueError(f"{key}: {reason}") from None
    if "wrong" in found:
        raise ValueError(f"{key}: {found['wrong']}")
    return found


def _try(answers: Connection, rewards: Mapping[str, RewardConfig], pictures: Sequence[Picture], measured: bool) -> None:
    """Send what is found of each reward, or what is `wrong` with it."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for config in rewards.values():
        try:
            reason = _untried(config, measured)
            answers.send({"untried": reason} if reason else probe(config, pictures, measured))
        except (Exception, SystemExit) as error:
            reason = one_line(error, 400)
            answers.send({"wrong": reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"})


def _untried(config: RewardConfig, measured: bool) -> str:
    import torch

    if config.runtime_env:
        return "it has an environment of its own, which Ray makes"
    missing = config.device == "cuda" and not torch.cuda.is_available()
    return "it needs a GPU and there is none here" if missing and not measured else ""


def _scores(
    reward: Reward, config: RewardConfig, pictures: Sequence[Picture], told: Sequence[Picture]
) -> NDArray[np.float32]:
    """In batches of `batch_size` pictures of one size, as the servers make them; whole groups at once."""
    size = len(pictures) if getattr(reward, "scope", "image") == "group" else config.batch_size
    scores = np.full(len(pictures), np.nan, np.float32)
    for shape in dict.fromkeys(picture.image.shape for picture in pictures):
        alike = [at for at, picture in enumerate(pictures) if picture.image.shape == shape]
        for batch in (alike[at : at + size] for at in range(0, len(alike), size)):
            images = np.stack([pictures[at].image for at in batch])
            prompts, metadata = [told[at].prompt for at in batch], [told[at].metadata for at in batch]
            scores[batch] = ask(reward, images, prompts, metadata, config.frames)
    return scores
