"""Random numbers that depend only on a key."""

import hashlib

import torch

from g2rpo_ray.types import Ints


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key, e.g. ("root", run seed, iteration, slot, prompt, number of the root).

    The same key gives the same numbers on every machine and in any order, so that any actor can compute a unit, also
    twice, with the same result.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_one(count: int, *key: int | str) -> int:
    """A number from 0 to `count` − 1."""
    return int(torch.randint(count, (), generator=generator(*key)))


def shuffled(count: int, *key: int | str) -> Ints:
    """A random permutation [count] of the numbers from 0 to `count` − 1."""
    order: Ints = torch.randperm(count, generator=generator(*key)).numpy()
    return order
