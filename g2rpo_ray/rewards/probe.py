"""Loads one reward and tries it on pictures, in a process of its own: what `rewards.check` starts for each reward.

Reads a pickled (RewardConfig, pictures) from its standard input, and writes what it found as one line of JSON.
"""

import json
import os
import pickle
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.config import RewardConfig
from g2rpo_ray.rewards.pictures import Picture
from g2rpo_ray.rewards.registry import Reward, ask, build_reward
from g2rpo_ray.words import one_line


def probe(config: RewardConfig, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Scores [N], those with each picture's neighbour's prompt, whether a second time gave the same bits; and costs.

    Of a reward that compares in groups all pictures are one group, of the first one's prompt.
    """
    import torch

    torch.set_num_threads(config.threads)
    started = time.perf_counter()
    reward = build_reward(config.kind, **config.options)
    loaded = time.perf_counter()
    together = getattr(reward, "scope", "image") == "group"
    told = [pictures[0]] * len(pictures) if together else list(pictures)
    first = _scores(reward, config, pictures, told)
    begun = time.perf_counter()
    again = _scores(reward, config, pictures, told)
    seconds = time.perf_counter() - begun
    other = first if together else _scores(reward, config, pictures, [*told[1:], told[0]])
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    return {
        "scores": first.tolist(),
        "other": other.tolist(),
        "same": first.tobytes() == again.tobytes(),
        "load_s": loaded - started,
        "per_s": len(pictures) / seconds,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gpu_gib": on_gpu / 2**30 if on_gpu else None,
        "group": together,
    }


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
            scores[batch] = ask(reward, images, prompts, metadata)
    return scores


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print is no answer
    try:
        found = probe(*pickle.load(sys.stdin.buffer))
    except (Exception, SystemExit) as error:
        named = isinstance(error, ValueError)
        found = {"wrong": one_line(error, 400) if named else f"{type(error).__name__}: {one_line(error, 400)}"}
    print(json.dumps(found), file=answers, flush=True)
