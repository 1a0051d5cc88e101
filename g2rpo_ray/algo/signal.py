"""Signals of a tree's scores: agreement of granularities, and spread at branch steps."""

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
    """Correlations [J, groups] of the advantages under each granularity and the finest, within comparison groups.

    NaN if either has no spread. Near 1, coarse completions give the same advantages as fine ones. Edges with a missing
    value are omitted.

    Args:
        tree: of one prompt.
        scores: [R, Q].
        group: see `edge_advantages`.
        finest: index of the finest granularity in `strides`.
        reward_weights: R numbers. Default: 1.
        steps: schedule indices of the groups that count. Default: all.
    """
    advantage = _advantages(tree, scores, group, reward_weights)
    counted = [members for members in _compared(tree, group) if steps is None or tree.start[members[0]] in steps]
    found = [_correlations(advantage[:, members], finest) for members in counted]
    return np.stack(found, axis=1) if found else advantage[:, :0]


def likeness(
    tree: Tree, scores: Floats, others: Floats, *, group: str, reward_weights: Sequence[float] | None = None
) -> Floats:
    """Correlations [groups] of the advantages under two sets of scores [R, Q], within comparison groups."""
    both = [
        _advantages(tree, one, group, reward_weights).mean(0) for one in (scores, others)
    ]  # [E], over granularities
    found = [_correlations(np.stack([one[members] for one in both]), 0)[1] for members in _compared(tree, group)]
    return np.stack(found)


def spreads(tree: Tree, scores: Floats, *, group: str, place: int | None = None) -> dict[int, list[float]]:
    """Unbiased std of each comparison group, by the schedule index at which it starts.

    Args:
        tree: of one prompt.
        scores: [Q] of one reward. Missing values, and groups with fewer than two values, are omitted.
        group: see `edge_advantages`.
        place: index of the granularity in `strides`. Default: the mean over all of them.
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
    """Advantages [J, E] of scores [R, Q], by granularity; NaN if a score is missing."""
    values = np.where(scored_edges(tree, scores), edge_values(tree, scores), np.nan)
    normal = normalise(tree, values, group=group, spread="group")
    if reward_weights is not None:
        normal = normal * np.reshape(np.asarray(reward_weights, np.float64), (-1, 1, 1))
    return np.asarray(normal.sum(0))


def _compared(tree: Tree, group: str) -> list[list[int]]:
    """The edges of each comparison group with trained edges."""
    number = groups(tree, group)
    return [np.flatnonzero(number == one).tolist() for one in np.unique(number[tree.trained])]


def _correlations(advantage: Floats, finest: int) -> Floats:
    """Correlations [J] of advantages [J, e] with those of `finest`."""
    deviation = advantage - advantage.mean(1, keepdims=True)
    norm = np.linalg.norm(deviation, axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return np.asarray((deviation @ deviation[finest]) / (norm * norm[finest]))
