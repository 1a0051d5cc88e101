"""What a tree's scores tell of its cost: which granularities and which branch steps are worth their evaluations."""

from collections.abc import Collection, Sequence

import numpy as np

from g2rpo_ray.algo.credit import Floats, edge_values, normalise, scored_edges
from g2rpo_ray.algo.tree import Tree, groups


def agreement(
    tree: Tree,
    scores: Floats,
    *,
    group: str,
    finest: int,
    reward_weights: Sequence[float] | None = None,
    steps: Collection[int] | None = None,
) -> Floats:
    """[J, groups]: correlation, within each comparison group, of the advantages under each granularity with `finest`'s.

    NaN where either has no spread. Where it is near 1, the coarse completions say what the fine ones do, for less. An
    edge that has a value missing is left out.

    Args:
        scores: [R, Q].
        finest: place of the finest granularity in `strides`.
        steps: schedule indices of the groups that count; None: all.
    """
    advantage = _advantages(tree, scores, group, reward_weights)
    counted = [members for members in _compared(tree, group) if steps is None or tree.start[members[0]] in steps]
    found = [_correlations(advantage[:, members], finest) for members in counted]
    return np.stack(found, axis=1) if found else advantage[:, :0]


def likeness(
    tree: Tree, scores: Floats, others: Floats, *, group: str, reward_weights: Sequence[float] | None = None
) -> Floats:
    """[groups]: correlation, within each comparison group, of the advantages under scores and under others, [R, Q]."""
    both = [
        _advantages(tree, one, group, reward_weights).mean(0) for one in (scores, others)
    ]  # [E], over granularities
    found = [_correlations(np.stack([one[members] for one in both]), 0)[1] for members in _compared(tree, group)]
    return np.stack(found)


def spreads(tree: Tree, scores: Floats, *, group: str, place: int | None = None) -> dict[int, list[float]]:
    """By schedule index, the unbiased std of each comparison group that starts there.

    Args:
        scores: [Q] of one reward. Values that are missing are left out; a group of fewer than two is none.
        place: of the granularity, in `strides`; None: the mean over all of them.
    """
    values = edge_values(tree, scores[None])[0]  # [J, E]
    values = values.mean(0) if place is None else values[place]
    found: dict[int, list[float]] = {}
    for members in _compared(tree, group):
        there = values[members][np.isfinite(values[members])]
        if len(there) > 1:
            found.setdefault(int(tree.start[members[0]]), []).append(float(there.std(ddof=1)))
    return found


def _advantages(tree: Tree, scores: Floats, group: str, reward_weights: Sequence[float] | None) -> Floats:
    """[J, E], of scores [R, Q], by granularity; NaN where one is missing."""
    values = np.where(scored_edges(tree, scores), edge_values(tree, scores), np.nan)
    normal = normalise(tree, values, group=group, spread="group")
    if reward_weights is not None:
        normal = normal * np.reshape(np.asarray(reward_weights, np.float64), (-1, 1, 1))
    return np.asarray(normal.sum(0))


def _compared(tree: Tree, group: str) -> list[list[int]]:
    """The edges of each comparison group that has trained ones."""
    number = groups(tree, group)
    return [np.flatnonzero(number == one).tolist() for one in np.unique(number[tree.trained])]


def _correlations(advantage: Floats, finest: int) -> Floats:
    """[J] of advantages [J, e]."""
    deviation = advantage - advantage.mean(1, keepdims=True)
    norm = np.linalg.norm(deviation, axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return np.asarray((deviation @ deviation[finest]) / (norm * norm[finest]))
