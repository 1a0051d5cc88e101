"""Progress per evaluation of completions and branch steps, from the gradients of probes.

The gradient of one prompt is nearly all noise, independent between prompts, so it cancels in inner products of
gradients of different prompts. With g_λ(i) the gradient of prompt i whose branches are completed with stride λ,
progress per evaluation is, for a tuned learning rate,

    E⟨g_1(i), g_λ(j)⟩² / (E|g_λ|² · c_λ),  i ≠ j.

A step of the best size along a noisy direction gains the square of its projection on the true one. See docs/methods.md.
Legend: n prompts, M branch steps, J strides, d numbers of a projected gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from g2rpo_ray.algo.credit import Floats

MIN_PROMPTS = 8  # for a comparison
CONFIDENCE = 1.96  # standard errors of a significant difference


@dataclass(frozen=True, slots=True)
class Alignment:
    """Statistics of the gradients of n prompts. Row 0 is of all, each other row of all but one (jackknife)."""

    steps: tuple[int, ...]  # M
    strides: tuple[int, ...]  # J, ascending: the first is the finest
    with_finest: Floats  # [n + 1, M, J]: E⟨g_1(i), g_λ(j)⟩
    with_itself: Floats  # [n + 1, M, J]: E⟨g_λ(i), g_λ(j)⟩
    square: Floats  # [n + 1, M, J]: E|g_λ|²

    @property
    def prompts(self) -> int:
        return len(self.square) - 1


def align(gradients: Floats, steps: Sequence[int], strides: Sequence[int]) -> Alignment:
    """The statistics of projected gradients [n, M, J, d] of at least three prompts, the finest stride first."""
    g = gradients.astype(np.float64)
    finest = np.broadcast_to(g[:, :, :1], g.shape)
    return Alignment(tuple(steps), tuple(strides), _products(finest, g), _products(g, g), _squares(g))


def _products(one: Floats, other: Floats) -> Floats:
    """Mean inner products [n + 1, M, J] of different prompts, of all and without each."""
    n = len(one)
    ones, others, same = one.sum(0), other.sum(0), (one * other).sum(-1)
    total = (ones * others).sum(-1) - same.sum(0)
    without = total - (one * others).sum(-1) - (ones * other).sum(-1) + 2 * same  # minus its pairs with the others
    return np.concatenate([total[None] / (n * (n - 1)), without / ((n - 1) * (n - 2))])


def _squares(g: Floats) -> Floats:
    square = (g**2).sum(-1)
    total = square.sum(0)
    return np.concatenate([total[None] / len(g), (total - square) / (len(g) - 1)])


def progress(found: Alignment, cost: Floats) -> Floats:
    """Progress per evaluation [n + 1, M, J], 0 for a negative projection. `cost` [M, J] is in evaluations."""
    with np.errstate(invalid="ignore"):
        each = np.maximum(found.with_finest, 0) ** 2 / (found.square * cost)
    return np.nan_to_num(each)


def of_all_steps(found: Alignment, cost: Floats) -> Floats:
    """Progress per evaluation [n + 1, J] of all steps together, with equal weights."""
    product, square = found.with_finest.sum(1), found.square.sum(1)
    with np.errstate(invalid="ignore"):
        each = np.maximum(product, 0) ** 2 / (square * cost.sum(0))
    return np.nan_to_num(each)


def cosines(found: Alignment) -> Floats:
    """Cosines [n + 1, J] of the expected gradients of each stride and the finest, over all steps."""
    product, own = found.with_finest.sum(1), found.with_itself.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(product / np.sqrt(own * own[:, :1]))


def standard_error(values: Floats) -> Floats:
    """Jackknife standard error of values [n + 1, ...], of all prompts and without each."""
    n = len(values) - 1
    return np.asarray(np.sqrt((n - 1) * ((values[1:] - values[1:].mean(0)) ** 2).mean(0)))


def is_better(one: Floats, other: Floats) -> bool:
    """True if a value [n + 1] is significantly above another."""
    if len(one) - 1 < MIN_PROMPTS:
        return False
    difference = one - other
    return bool(difference[0] > CONFIDENCE * standard_error(difference))


def coarsest_that_holds(values: Floats) -> int:
    """Index of the chosen stride by values [n + 1, J]: the coarsest, unless a finer one is significantly better."""
    return _improved(range(values.shape[1] - 2, -1, -1), values.shape[1] - 1, lambda place: values[:, place])


def _improved(candidates: Sequence[int], best: int, value: Callable[[int], Floats]) -> int:
    for candidate in candidates:
        if is_better(value(candidate), value(best)):
            best = candidate
    return best


def best_steps(values: Floats, number: int) -> tuple[int, ...]:
    """Ascending indices of `number` branch steps by values [n + 1, M].

    They are the last ones, which are cheapest, unless an earlier one is significantly better than the worst of them.
    """
    chosen = list(range(values.shape[1]))[-number:]
    for candidate in range(chosen[0] - 1, -1, -1):
        worst = min(chosen, key=lambda place: values[0, place])
        if is_better(values[:, candidate], values[:, worst]):
            chosen[chosen.index(worst)] = candidate
    return tuple(sorted(chosen))
