"""The prompts of a run, drawn in an order that the seed and the iteration decide."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from g2rpo_ray.types import Metadata


@dataclass(frozen=True, slots=True)
class Prompts:
    """The training and held-out prompts of a run."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    dropped: int  # training prompts that are held out too, and not trained on
    metadata: Mapping[str, Metadata] = field(default_factory=dict)  # by prompt, of those that have any

    @property
    def records(self) -> dict[str, Metadata]:
        """All prompts with their metadata."""
        return {prompt: self.metadata.get(prompt, {}) for prompt in (*self.train, *self.heldout)}


def without_heldout(train: Sequence[str], heldout: Sequence[str]) -> tuple[str, ...]:
    """The training prompts that are no held-out ones, whatever their capitals and spaces.

    They are dropped from training, and not from what is held out: a comparison must mean the same for every run, and a
    prompt that was trained on would flatter this one.
    """
    held = {_alike(prompt) for prompt in heldout}
    return tuple(prompt for prompt in train if _alike(prompt) not in held)


def _alike(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def iteration_prompts(prompts: Sequence[str], per_iteration: int, seed: int, iteration: int) -> tuple[str, ...]:
    """The prompts of one iteration, counted from 0: no two the same.

    Each epoch has an order of its own and len(prompts) // per_iteration whole iterations; the prompts left over wait
    for another epoch, as with a data loader that drops its last batch. `prompts` holds none twice.

    Raises:
        ValueError: there are fewer prompts than an iteration needs.
    """
    if per_iteration > len(prompts):
        raise ValueError(
            f"data.prompts_per_iteration: {per_iteration} given, but data.train_prompts has {len(prompts)}; "
            "lower it, or add prompts"
        )
    epoch, place = divmod(iteration, len(prompts) // per_iteration)
    return _epoch_order(prompts, seed, epoch)[place * per_iteration : (place + 1) * per_iteration]


def drawn_prompts(prompts: Sequence[str], per_iteration: int, seed: int, iterations: int) -> tuple[str, ...]:
    """The prompts that `iterations` iterations from the first draw, each once, in the order of their first use.

    A run over a big file uses few of its prompts, and an embedding takes megabytes: these alone need encoding.
    """
    an_epoch = len(prompts) // per_iteration
    drawn: dict[str, None] = {}
    for epoch, first in enumerate(range(0, iterations, an_epoch)):
        used = min(an_epoch, iterations - first) * per_iteration
        drawn.update(dict.fromkeys(_epoch_order(prompts, seed, epoch)[:used]))
        if len(drawn) == len(prompts):
            break
    return tuple(drawn)


def _epoch_order(prompts: Sequence[str], seed: int, epoch: int) -> tuple[str, ...]:
    order = list(prompts)
    random.Random(f"{seed}/{epoch}").shuffle(order)  # seeded by a string: the same on every platform
    return tuple(order)
