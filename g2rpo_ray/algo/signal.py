"""What a tree's scores tell of its cost: which granularities and which branch steps are worth their evaluations."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo.credit import edge_values, groups, normalise, scored_edges
from g2rpo_ray.algo.tree import Tree


def agreement(
    tree: Tree,
    scores: Tensor,
    *,
    group: str,
    finest: int,
    reward_weights: Sequence[float] | None = None,
    steps: Collection[int] | None = None,
) -> Tensor:
    """[J, groups]: correlation, within each comparison group, of the advantages under each granularity with `finest`'s.

    NaN where either has no spread. Where it is near 1, the coarse completions say what the fine ones do, for less. An
    edge that has a value missing is left out.

    Args:
        scores: [R, Q].
        finest: place of the finest granularity in `strides`.
        steps: schedule indices of the groups that count; None: all.
    """
    values = torch.where(scored_edges(tree, scores), edge_values(tree, scores), torch.nan)
    normal = normalise(tree, values, group=group, spread="group")
    if reward_weights is not None:
        normal = normal * torch.as_tensor(reward_weights, dtype=normal.dtype).view(-1, 1, 1)
    advantage = normal.sum(0)  # [J, E]
    counted = [members for members in _compared(tree, group) if steps is None or tree.start[members[0]] in steps]
    found = [_correlations(advantage[:, members], finest) for members in counted]
    return torch.stack(found, dim=1) if found else advantage[:, :0]


def spreads(tree: Tree, scores: Tensor, *, group: str, place: int | None = None) -> dict[int, list[float]]:
    """By schedule index, the unbiased std of each comparison group that starts there.

    Args:
        scores: [Q] of one reward. Values that are missing are left out; a group of fewer than two is none.
        place: of the granularity, in `strides`; None: the mean over all of them.
    """
    values = edge_values(tree, scores[None])[0]  # [J, E]
    values = values.mean(0) if place is None else values[place]
    found: dict[int, list[float]] = {}
    for members in _compared(tree, group):
        there = values[members][values[members].isfinite()]
        if len(there) > 1:
            found.setdefault(int(tree.start[members[0]]), []).append(float(there.std()))
    return found


def _compared(tree: Tree, group: str) -> list[list[int]]:
    """The edges of each comparison group that has trained ones."""
    number = groups(tree, group)
    return [np.flatnonzero(number == one).tolist() for one in np.unique(number[tree.trained])]


def _correlations(advantage: Tensor, finest: int) -> Tensor:
    """[J] of advantages [J, e]."""
    deviation = advantage - advantage.mean(1, keepdim=True)
    norm = deviation.norm(dim=1)
    return (deviation @ deviation[finest]) / (norm * norm[finest])
