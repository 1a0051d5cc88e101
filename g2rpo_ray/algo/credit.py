"""Credit: from the scores of leaves to the advantage of each trained edge.

value of an edge: mean score of the leaves below it ─► minus its group's mean, over the spread
─► summed over rewards and granularities with their weights ─► clamped
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo.tree import ANCHOR, Ints, Tree

GROUP_EPSILON, BATCH_EPSILON = 1e-8, 1e-4  # added to a standard deviation, as the papers have them


def edge_advantages(
    tree: Tree,
    scores: Tensor,
    *,
    group: str,
    spread: str,
    batch_std: Sequence[float] | Tensor | None = None,
    reward_weights: Sequence[float] | None = None,
    granularity_weights: Sequence[float] | None = None,
    clip: float | None = 5.0,
) -> Tensor:
    """A[e] = Σ_r w_r Σ_j w_j (value[r, j, e] − mean of its group) / spread, clamped to ±clip.

    Args:
        scores: [R, Q], NaN where one is missing: it is in no mean, and an edge that has a value missing gets 0.
        group: `siblings`, the edges of one parent (G²RPO, section 3.3), or `step`, the edges that start at one index
            (Flow-GRPO, DanceGRPO, MixGRPO). An edge that is not trained is compared with, too: where the trained steps
            are drawn, DanceGRPO normalises over all members.
        spread: `group`, the unbiased std of the group's values + 1e-8, or `batch`, `batch_std` + 1e-4 (Flow-GRPO).
        batch_std: [R], see `batch_std`.
        reward_weights, granularity_weights: R and J numbers, all 1 by default.

    Returns:
        [E], in the dtype of `scores`. Untrained edges, and groups without spread or of fewer than two values, have 0.

    Raises:
        ValueError: an unknown group or spread, or `batch` without `batch_std`.
    """
    values = edge_values(tree, scores)
    normal = normalise(tree, values, group=group, spread=spread, batch_std=batch_std)
    for weights, shape in ((reward_weights, (-1, 1, 1)), (granularity_weights, (1, -1, 1))):
        if weights is not None:
            normal = normal * torch.as_tensor(weights, dtype=normal.dtype, device=normal.device).view(shape)
    counted = scored_edges(tree, scores) & torch.tensor(tree.trained, device=scores.device)
    advantage = torch.where(counted, normal.sum((0, 1)), 0)
    return (advantage if clip is None else advantage.clamp(-clip, clip)).to(scores.dtype)


def edge_values(tree: Tree, scores: Tensor) -> Tensor:
    """[R, J, E] in float64: the mean of the scores [R, Q] that are there below each edge, by granularity; else NaN."""
    tags = sorted(set(tree.tag.tolist()) - {ANCHOR})
    below = np.zeros((len(tags), len(tree.source), len(tree.leaf)))
    for edge in range(len(tree.source)):
        leaves = tree.below(edge)
        below[tree.tag[leaves], edge, leaves] = 1
    mask = torch.tensor(below, device=scores.device)
    there = torch.isfinite(scores)
    total = torch.einsum("jeq,rq->rje", mask, torch.where(there, scores, 0).double())
    return total / torch.einsum("jeq,rq->rje", mask, there.double())  # 0 / 0 is NaN


def scored_edges(tree: Tree, scores: Tensor) -> Tensor:
    """Bool [E]: edges that have a value under every reward and granularity. The others take no part in the loss."""
    return edge_values(tree, scores).isfinite().all(0).all(0)


def normalise(
    tree: Tree, values: Tensor, *, group: str, spread: str, batch_std: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Values [R, J, E] minus the mean of their group, over the spread; 0 where a group has none, or a value is NaN."""
    if spread not in ("group", "batch"):
        raise ValueError(f"spread: {spread!r} given; allowed are 'group' and 'batch'")
    member = torch.tensor(groups(tree, group), device=values.device)
    there = values.isfinite()
    known = torch.where(there, values, 0)
    size = (*values.shape[:2], int(member.max()) + 1)
    where = member.expand_as(values)

    def total(of: Tensor) -> Tensor:
        """Sums over each group, [R, J, groups]."""
        return torch.zeros(size, dtype=of.dtype, device=of.device).scatter_add(2, where, of)

    count = total(there.double())
    deviation = torch.where(there, known - (total(known) / count).gather(2, where), 0)
    if spread == "group":
        scale = (total(deviation.square()) / (count - 1).clamp(min=1)).sqrt() + GROUP_EPSILON
    elif batch_std is None:
        raise ValueError("spread: 'batch' needs batch_std, the std of each reward over the whole iteration")
    else:
        given = torch.as_tensor(batch_std, dtype=values.dtype, device=values.device)
        scale = (given + BATCH_EPSILON).view(-1, 1, 1).expand(size)
    flat = without_spread(tree, values, group).gather(2, where)
    return torch.where(flat, 0, deviation / scale.gather(2, where))


def without_spread(tree: Tree, values: Tensor, group: str) -> Tensor:
    """Bool [R, J, groups]: groups whose values [R, J, E] that are there are all one number, or fewer than two.

    Told from the largest and smallest: the rounding of a mean would turn equal scores into noise of size one.
    """
    member = torch.tensor(groups(tree, group), device=values.device).expand_as(values)
    there = values.isfinite()
    size = (*values.shape[:2], int(member.max()) + 1)
    highest, lowest = (
        torch.full(size, sign * -torch.inf, dtype=values.dtype, device=values.device).scatter_reduce(
            2, member, torch.where(there, values, sign * -torch.inf), "amax" if sign > 0 else "amin"
        )
        for sign in (1, -1)
    )
    return highest <= lowest


def groups(tree: Tree, group: str) -> Ints:
    """[E]: the number of each edge's comparison group, from 0 up."""
    if group not in ("siblings", "step"):
        raise ValueError(f"group: {group!r} given; allowed are 'siblings' and 'step'")
    key = tree.source if group == "siblings" else tree.start
    return np.unique(key, return_inverse=True)[1]


def compared_leaves(tree: Tree, group: str) -> list[Ints]:
    """Which leaves [Q] are compared with each other: a part of them a group and granularity, parts that overlap joined.

    The edges of a chain have the same leaves below them, those of siblings lie inside their parents': what is left is
    the widest group of each leaf. Anchors are in none.
    """
    number, part = groups(tree, group), np.arange(len(tree.leaf))
    for of_group in range(int(number.max()) + 1):
        below = np.concatenate([tree.below(edge) for edge in np.flatnonzero(number == of_group).tolist()])
        for tag in np.unique(tree.tag[below]):
            parts = np.unique(part[below[tree.tag[below] == tag]])
            part[np.isin(part, parts)] = parts[0]
    compared = tree.tag != ANCHOR
    return [np.flatnonzero((part == one) & compared) for one in np.unique(part[compared])]


def batch_std(trees: Sequence[Tree], scores: Sequence[Tensor]) -> Tensor:
    """[R] float64: the population std of each reward over all leaves but anchors' of an iteration, [R, Q] a prompt.

    Flow-GRPO's spread: it belongs to the iteration, whatever the number of ranks. A missing score is in none of them.
    """
    parts = [part[:, tree.tag != ANCHOR] for tree, part in zip(trees, scores, strict=True)]
    rows = torch.cat(parts, dim=1).double()
    return torch.stack([row[row.isfinite()].std(correction=0) for row in rows])
