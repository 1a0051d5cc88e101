"""The prompts of a run, and their order by seed and iteration."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from g2rpo_ray.types import Metadata


@dataclass(frozen=True, slots=True)
class Prompts:
    """The training and held-out prompts of a run."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    dropped: int  # number of training prompts that were dropped because they are held out
    metadata: Mapping[str, Metadata] = field(default_factory=dict)  # by prompt, if not empty

    @property
    def records(self) -> dict[str, Metadata]:
        """All prompts with their metadata."""
        return {prompt: self.metadata.get(prompt, {}) for prompt in (*self.train, *self.heldout)}


def without_heldout(train: Sequence[str], heldout: Sequence[str]) -> tuple[str, ...]:
    """The training prompts that are not held out, ignoring case and spaces.

    Duplicates are dropped from training, so that the held-out set is the same for all runs.
    """
    held = {_alike(prompt) for prompt in heldout}
    return tuple(prompt for prompt in train if _alike(prompt) not in held)


def _alike(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def iteration_prompts(prompts: Sequence[str], per_iteration: int, seed: int, iteration: int) -> tuple[str, ...]:
    """The different prompts of one iteration, counted from 0.

    Each epoch has another order and len(prompts) // per_iteration iterations. Like a data loader with drop_last, it
    does not use the remaining prompts. `prompts` must not have duplicates.

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
    """The prompts of the first `iterations` iterations, each once, in the order of first use.

    Only these need embeddings, which take megabytes each.
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
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a string seed gives the same order on every platform
    return tuple(order)
