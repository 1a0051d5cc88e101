"""Prompts: read from a text file, and drawn in an order that the seed and the iteration decide."""

import random
from collections.abc import Sequence
from pathlib import Path

from g2rpo_ray.files import resolve


def read_prompts(path: str, key: str) -> tuple[str, ...]:
    """The prompts of a text file, one a line, stripped; blank lines and repetitions are left out.

    `key` is the configuration key that names the file.

    Raises:
        ValueError: one line that names the key, the file and what to do.
    """
    try:
        text = Path(resolve(path)).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except OSError as error:
        raise ValueError(f"{key}: cannot read {path} ({error.strerror}); give a text file, a prompt a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    prompts = dict.fromkeys(line.strip() for line in text.split("\n"))
    prompts.pop("", None)
    if not prompts:
        raise ValueError(f"{key}: {path} holds no prompt; write one a line")
    return tuple(prompts)


def iteration_prompts(prompts: Sequence[str], per_iteration: int, seed: int, iteration: int) -> tuple[str, ...]:
    """The prompts of one iteration, counted from 0: no two the same.

    Each epoch has an order of its own and len(prompts) // per_iteration whole iterations; the prompts left over wait
    for another epoch, as with a data loader that drops its last batch. `prompts` holds none twice.

    Raises:
        ValueError: there are fewer prompts than an iteration needs.
    """
    if per_iteration > len(prompts):
        raise ValueError(
            f"data.prompts_per_iteration: {per_iteration} given, but there are {len(prompts)} prompts; "
            "lower it or add lines to data.train_prompts"
        )
    epoch, place = divmod(iteration, len(prompts) // per_iteration)
    order = list(prompts)
    random.Random(f"{seed}/{epoch}").shuffle(order)  # seeded by a string: the same on every platform
    return tuple(order[place * per_iteration : (place + 1) * per_iteration])
