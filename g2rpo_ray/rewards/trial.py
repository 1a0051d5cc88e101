"""Trial of rewards before a run: each is built and scores images, in a separate process.

So a module that ends or hangs its process does not affect ours, and the measured memory is that of the rewards.
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
"""The result of a trial: see `probe`; or `untried`, the reason why the reward was not tried on this machine."""


@contextmanager
def trial(
    rewards: Mapping[str, RewardConfig],
    pictures: Sequence[Picture],
    limit_s: float,
    measured: bool = False,
    sized: bool = False,
) -> Iterator[Callable[[], dict[str, Found]]]:
    """Starts to build the rewards and to score the images with each.

    Yields a function that waits for the results and returns them by key.

    Args:
        rewards: by key.
        pictures: to score.
        limit_s: time limit for each reward, in seconds.
        sized: the results are those of `sizes` in place of `probe`'s.
        measured: see `probe`; rewards with `device: cuda` are then tried without a GPU too.

    Raises:
        ValueError: one line; a reward cannot be built, returns no scores, ends its process, or takes too long.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["torch", __name__])  # loaded once for all trials of this process
    here, there = forking.Pipe(duplex=False)
    arguments = (there, dict(os.environ), dict(rewards), list(pictures), measured, sized)
    process = forking.Process(target=_try, args=arguments)
    with children_ignore_interrupts():
        process.start()
    there.close()  # the end of the process is the end of the pipe
    try:
        yield lambda: {key: _answer(key, here, process, limit_s) for key in rewards}
    finally:
        process.kill()
        process.join()


def probe(config: RewardConfig, pictures: Sequence[Picture], measured: bool = True) -> Found:
    """Builds a reward; returns its `scores` [N] of the images, and True as `group` if it compares groups.

    For such a reward all images are one group, with the first one's prompt. If `measured`, the result also has scores
    with other images' prompts (`other`), `same` (True if a repetition gave the same bits), times and memory.
    """
    import torch

    set_up_torch(True, config.threads)
    started = time.perf_counter()
    reward = open_reward(config)
    load_s = time.perf_counter() - started
    together = getattr(reward, "scope", "image") == "group"
    prompted = [pictures[0]] * len(pictures) if together else list(pictures)
    first = _scores(reward, config, pictures, prompted)
    found = {"scores": first.tolist(), "group": together}
    if not measured:
        return found
    begun = time.perf_counter()
    again = _scores(reward, config, pictures, prompted)
    seconds = time.perf_counter() - begun
    other = first if together else _scores(reward, config, pictures, [*prompted[1:], prompted[0]])
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    return found | {
        "other": other.tolist(),
        "same": first.tobytes() == again.tobytes(),
        "load_s": load_s,
        "per_s": len(pictures) / seconds,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gpu_gib": on_gpu / 2**30 if on_gpu else None,
    }


def sizes(config: RewardConfig, pictures: Sequence[Picture]) -> Found:
    """Bytes of a reward's tensors on its device: the model's (`weights`), and the peak of those that scoring makes
    (`scoring`). The model is read, but the images are scored without data.

    Raises:
        ValueError: one line; the reward cannot be built, or its code needs data.
    """
    from g2rpo_ray.allocations import held_bytes, peak_bytes
    from g2rpo_ray.without_data import META, without_data

    set_up_torch(True, config.threads)
    with without_data():
        reward = open_reward(config, META)
        try:
            scoring = peak_bytes(lambda: _scores(reward, config, pictures, pictures))
        except (RuntimeError, TypeError, IndexError, KeyError) as error:
            raise ValueError(f"fails at full size without data: {one_line(error, 300)}") from None
        return {"weights": held_bytes(), "scoring": scoring}


def _answer(key: str, answers: Connection, process: Any, limit_s: float) -> Found:
    if not answers.poll(limit_s):
        raise ValueError(f"{key}: no score within startup_timeout_s={limit_s:g}; raise it, or see why it is slow")
    try:
        found: Found = answers.recv()
    except EOFError:
        process.join()
        reason = f"its process ended with status {process.exitcode} before the first score"
        raise ValueError(f"{key}: {reason}") from None
    if "wrong" in found:
        raise ValueError(f"{key}: {found['wrong']}")
    return found


def _try(
    answers: Connection,
    environment: Mapping[str, str],
    rewards: Mapping[str, RewardConfig],
    pictures: Sequence[Picture],
    measured: bool,
    sized: bool,
) -> None:
    """Sends the result of each reward, or the error as `wrong`."""
    os.environ.clear()  # the server that forked this process has that of the first trial
    os.environ.update(environment)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for config in rewards.values():
        try:
            reason = _untried(config, measured)
            found = sizes(config, pictures) if sized else None
            answers.send(found or ({"untried": reason} if reason else probe(config, pictures, measured)))
        except (Exception, SystemExit) as error:
            reason = one_line(error, 400)
            answers.send({"wrong": reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"})


def _untried(config: RewardConfig, measured: bool) -> str:
    import torch

    if config.runtime_env:
        return "it has a runtime_env, which only Ray creates"
    missing = config.device == "cuda" and not torch.cuda.is_available()
    return "it needs a GPU, which this machine does not have" if missing and not measured else ""


def _scores(
    reward: Reward, config: RewardConfig, pictures: Sequence[Picture], prompted: Sequence[Picture]
) -> NDArray[np.float32]:
    """Scores [N] with the prompts of `prompted`, in the servers' batches of images of one size, or as one group."""
    size = len(pictures) if getattr(reward, "scope", "image") == "group" else config.batch_size
    scores = np.full(len(pictures), np.nan, np.float32)
    for shape in dict.fromkeys(picture.image.shape for picture in pictures):
        alike = [at for at, picture in enumerate(pictures) if picture.image.shape == shape]
        for batch in (alike[at : at + size] for at in range(0, len(alike), size)):
            images = np.stack([pictures[at].image for at in batch])
            prompts, metadata = [prompted[at].prompt for at in batch], [prompted[at].metadata for at in batch]
            scores[batch] = ask(reward, images, prompts, metadata, config.frames)
    return scores
