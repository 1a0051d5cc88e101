"""Which completions and branch steps are worth their evaluations, by the gradients of probes.

The gradient of one prompt is nearly all noise, which differs from prompt to prompt. Inner products of gradients of
different prompts lose the noise. With g_λ(i) the gradient of prompt i whose branches are completed with stride λ,
progress for an evaluation is, for a tuned learning rate,

    E⟨g_1(i), g_λ(j)⟩² / (E|g_λ|² · c_λ),  i ≠ j:

a step of the best size along a noisy direction gains the square of its projection on the true one. See docs/methods.md.
Legend: n prompts, M branch steps, J strides, d numbers of a projected gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from g2rpo_ray.algo.credit import Floats

FEWEST = 8  # prompts, below which nothing is concluded
CONFIDENCE = 1.96  # standard errors of a difference that counts as evidence


@dataclass(frozen=True, slots=True)
class Alignment:
    """What the gradients of n prompts tell; in row 0 of all of them, in each other row of all but one (jackknife)."""

    steps: tuple[int, ...]  # M
    strides: tuple[int, ...]  # J, ascending: the first is the finest
    with_finest: Floats  # [n + 1, M, J]: E⟨g_1(i), g_λ(j)⟩
    with_itself: Floats  # [n + 1, M, J]: E⟨g_λ(i), g_λ(j)⟩
    square: Floats  # [n + 1, M, J]: E|g_λ|²

    @property
    def prompts(self) -> int:
        return len(self.square) - 1


def align(gradients: Floats, steps: Sequence[int], strides: Sequence[int]) -> Alignment:
    """From projected gradients [n, M, J, d] of at least three prompts, the finest stride first."""
    g = gradients.astype(np.float64)
    finest = np.broadcast_to(g[:, :, :1], g.shape)
    return Alignment(tuple(steps), tuple(strides), _products(finest, g), _products(g, g), _squares(g))


def _products(one: Floats, other: Floats) -> Floats:
    """[n + 1, M, J]: mean inner product of different prompts, of all and without each."""
    n = len(one)
    ones, others, same = one.sum(0), other.sum(0), (one * other).sum(-1)
    total = (ones * others).sum(-1) - same.sum(0)
    without = total - (one * others).sum(-1) - (ones * other).sum(-1) + 2 * same  # its pairs with the others
    return np.concatenate([total[None] / (n * (n - 1)), without / ((n - 1) * (n - 2))])


def _squares(g: Floats) -> Floats:
    square = (g**2).sum(-1)
    total = square.sum(0)
    return np.concatenate([total[None] / len(g), (total - square) / (len(g) - 1)])


def progress(found: Alignment, cost: Floats) -> Floats:
    """[n + 1, M, J], for an evaluation; 0 where a completion points away. `cost`: [M, J], evaluations of a step."""
    with np.errstate(invalid="ignore"):
        each = np.maximum(found.with_finest, 0) ** 2 / (found.square * cost)
    return np.nan_to_num(each)


def of_all_steps(found: Alignment, cost: Floats) -> Floats:
    """[n + 1, J]: progress of all steps together, whose gradients count alike."""
    product, square = found.with_finest.sum(1), found.square.sum(1)
    with np.errstate(invalid="ignore"):
        each = np.maximum(product, 0) ** 2 / (square * cost.sum(0))
    return np.nan_to_num(each)


def cosines(found: Alignment) -> Floats:
    """[n + 1, J]: of the expected gradients of each stride and of the finest, over all steps."""
    product, own = found.with_finest.sum(1), found.with_itself.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(product / np.sqrt(own * own[:, :1]))


def standard_error(values: Floats) -> Floats:
    """By jackknife, of values [n + 1, ...] of all prompts and without each."""
    n = len(values) - 1
    return np.asarray(np.sqrt((n - 1) * ((values[1:] - values[1:].mean(0)) ** 2).mean(0)))


def is_better(one: Floats, other: Floats) -> bool:
    """Whether a value [n + 1] is above another beyond chance."""
    if len(one) - 1 < FEWEST:
        return False
    difference = one - other
    return bool(difference[0] > CONFIDENCE * standard_error(difference))


def coarsest_that_holds(values: Floats) -> int:
    """Place in the strides of values [n + 1, J]: the coarsest, unless a finer one is better beyond chance."""
    return _improved(range(values.shape[1] - 2, -1, -1), values.shape[1] - 1, lambda place: values[:, place])


def _improved(candidates: Sequence[int], best: int, value: Callable[[int], Floats]) -> int:
    for candidate in candidates:
        if is_better(value(candidate), value(best)):
            best = candidate
    return best


def best_steps(values: Floats, number: int) -> tuple[int, ...]:
    """Places of so many branch steps of values [n + 1, M], ascending: the last ones, which are the cheapest, unless
    an earlier one is better than the worst of them beyond chance."""
    chosen = list(range(values.shape[1]))[-number:]
    for candidate in range(chosen[0] - 1, -1, -1):
        worst = min(chosen, key=lambda place: values[0, place])
        if is_better(values[:, candidate], values[:, worst]):
            chosen[chosen.index(worst)] = candidate
    return tuple(sorted(chosen))
