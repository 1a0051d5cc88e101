"""Random numbers that depend on what they are for, and on nothing else."""

import hashlib

import torch

from g2rpo_ray.types import Ints


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key, e.g. ("root", run seed, iteration, slot, prompt, number of the root).

    The same key gives the same numbers on every machine, whoever asks and in whatever order, so that a work unit can be
    computed by any actor, or twice, with one result.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_one(count: int, *key: int | str) -> int:
    """A number from 0 to `count` − 1."""
    return int(torch.randint(count, (), generator=generator(*key)))


def shuffled(count: int, *key: int | str) -> Ints:
    """[count]: the numbers from 0 to `count` − 1 in some order."""
    order: Ints = torch.randperm(count, generator=generator(*key)).numpy()
    return order
