"""Granularity: the index paths of completions, and the ladder and choices of `auto`. No torch."""

from dataclasses import dataclass


def completion_path(branch_step: int, steps: int, stride: int, layout: str) -> list[int]:
    """Schedule indices from branch_step + 1 to `steps` of a branch at granularity `stride`.

    `paper`: the remaining-step counts 1, 1 + λ, 1 + 2λ … below the start in descending order, then the image.
    `authors` (their released code): one fine step, then every λ-th index. If the last of these is not the image, it is
    replaced by the image.
    """
    start = branch_step + 1
    if layout == "paper":
        remaining = range(1, steps - start, stride)
        return [start, *(steps - count for count in reversed(remaining)), *([steps] if start < steps else [])]
    if layout == "authors":
        listed = [start, *range(start + 1, steps + 1, stride)]
        return listed if listed[-1] == steps else [*(listed[:-1] if len(listed) > 1 else listed), steps]
    raise ValueError(f"layout: {layout!r} given; allowed are 'paper' and 'authors'")


def ladder(branch_step: int, steps: int, largest: int, layout: str) -> tuple[int, ...]:
    """Strides from 1 to `largest`, each with at most half of the evaluations of the one before: 1, 2, 4, 8 of 10 steps.

    Args:
        branch_step: the index before the start of the longest completion.
        steps: T, sampling steps.
        largest: bound of the strides.
        layout: see `completion_path`.
    """

    def evaluations(stride: int) -> int:
        return len(completion_path(branch_step, steps, stride, layout)) - 1

    found = [1]
    for stride in range(2, min(largest, steps) + 1):
        if evaluations(stride) < evaluations(found[-1]) and evaluations(stride) <= (evaluations(found[-1]) + 1) // 2:
            found.append(stride)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Choice:
    """The values of `auto` for an iteration."""

    strides: tuple[int, ...]
    branch_steps: tuple[int, ...]
