"""Credit: from the scores of leaves to the advantage of each trained edge. Numpy only, because the driver imports it.

value of an edge: mean score of the leaves below it ─► minus its group's mean, over the spread
─► summed over rewards and granularities with their weights ─► clamped
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.algo.tree import ANCHOR, Tree, groups

GROUP_EPSILON, BATCH_EPSILON = 1e-8, 1e-4  # added to a standard deviation, as in the papers
Floats = NDArray[np.floating[Any]]


def edge_advantages(
    tree: Tree,
    scores: Floats,
    *,
    group: str,
    spread: str,
    batch_std: Sequence[float] | Floats | None = None,
    reward_weights: Sequence[float] | None = None,
    granularity_weights: Sequence[float] | None = None,
    clip: float | None = 5.0,
    least_spread: float = 0.0,
) -> Floats:
    """A[e] = Σ_r w_r Σ_j w_j (value[r, j, e] − mean of its group) / spread, clamped to ±clip.

    Args:
        tree: of one prompt.
        scores: [R, Q], NaN if missing. Means omit missing scores, and an edge with a missing value gets 0.
        group: `siblings`, the edges of one parent (G²RPO, section 3.3), or `step`, the edges that start at one index
            (Flow-GRPO, DanceGRPO, MixGRPO). Groups include untrained edges: if trained steps are drawn, DanceGRPO
            normalises over all members.
        spread: `group`, the unbiased std of the group's values + 1e-8, or `batch`, `batch_std` + 1e-4 (Flow-GRPO).
        batch_std: [R], see `batch_std`.
        reward_weights, granularity_weights: R and J numbers, all 1 by default.
        clip: maximum absolute advantage.
        least_spread: see `without_spread`.

    Returns:
        [E], in the dtype of `scores`. Untrained edges, and groups without spread or of fewer than two values, have 0.

    Raises:
        ValueError: an unknown group or spread, or `batch` without `batch_std`.
    """
    values = edge_values(tree, scores)
    normal = normalise(tree, values, group=group, spread=spread, batch_std=batch_std, least_spread=least_spread)
    for weights, shape in ((reward_weights, (-1, 1, 1)), (granularity_weights, (1, -1, 1))):
        if weights is not None:
            normal = normal * np.reshape(np.asarray(weights, np.float64), shape)
    counted = scored_edges(tree, scores) & tree.trained
    advantage = np.where(counted, normal.sum((0, 1)), 0)
    return (advantage if clip is None else advantage.clip(-clip, clip)).astype(scores.dtype)


def edge_values(tree: Tree, scores: Floats) -> Floats:
    """Values [R, J, E] float64: the mean of the present scores [R, Q] below each edge, by granularity; NaN if none."""
    tags = sorted(set(tree.tag.tolist()) - {ANCHOR})
    below = np.zeros((len(tags), len(tree.source), len(tree.leaf)))
    for edge in range(len(tree.source)):
        leaves = tree.below(edge)
        below[tree.tag[leaves], edge, leaves] = 1
    there = np.isfinite(scores)
    total = np.einsum("jeq,rq->rje", below, np.where(there, scores, 0).astype(np.float64))
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return np.asarray(total / np.einsum("jeq,rq->rje", below, there.astype(np.float64)))


def scored_edges(tree: Tree, scores: Floats) -> NDArray[np.bool_]:
    """Bool [E]: edges with a value under every reward and granularity. The others are not in the loss."""
    return np.asarray(np.isfinite(edge_values(tree, scores)).all((0, 1)))


def normalise(
    tree: Tree, values: Floats, *, group: str, spread: str, batch_std: Sequence[float] | Floats | None = None,
    least_spread: float = 0.0,
) -> Floats:  # fmt: skip
    """Values [R, J, E] minus the mean of their group, over the spread; 0 for a group without spread or a NaN value."""
    if spread not in ("group", "batch"):
        raise ValueError(f"spread: {spread!r} given; allowed are 'group' and 'batch'")
    member = groups(tree, group)
    there = np.isfinite(values)
    known = np.where(there, values, 0)
    count = _by_group(np.add, there.astype(np.float64), member, 0)
    mean = _by_group(np.add, known, member, 0) / np.maximum(count, 1)
    deviation = np.where(there, known - mean[..., member], 0)
    if spread == "group":
        scale = np.sqrt(_by_group(np.add, deviation**2, member, 0) / np.maximum(count - 1, 1)) + GROUP_EPSILON
    elif batch_std is None:
        raise ValueError("spread: 'batch' needs batch_std, the std of each reward over the whole iteration")
    else:
        scale = np.broadcast_to(np.reshape(np.asarray(batch_std) + BATCH_EPSILON, (-1, 1, 1)), count.shape)
    flat = without_spread(tree, values, group, least_spread)[..., member]
    return np.where(flat, 0, deviation / scale[..., member])


def without_spread(tree: Tree, values: Floats, group: str, least: float = 0.0) -> NDArray[np.bool_]:
    """Bool [R, J, groups]: groups with fewer than two present values [R, J, E], or a range of at most `least`.

    It uses the largest and smallest value, since the rounding of a mean would turn equal scores into noise. A `least`
    above 0 is from Edit-R1 (arXiv 2510.16888).
    """
    member, there = groups(tree, group), np.isfinite(values)
    highest = _by_group(np.maximum, np.where(there, values, -np.inf), member, -np.inf)
    lowest = _by_group(np.minimum, np.where(there, values, np.inf), member, np.inf)
    return np.asarray((highest <= lowest) | (highest - lowest <= least))


def _by_group(combine: np.ufunc, values: Floats, member: NDArray[Any], start: float) -> Floats:
    """The values [R, J, E] of each group combined, [R, J, groups]."""
    found = np.full((*values.shape[:2], int(member.max()) + 1), start, np.float64)
    combine.at(found, (..., member), values)  # type: ignore[arg-type]  # numpy's stubs know no tuples here
    return found


def batch_std(trees: Sequence[Tree], scores: Sequence[Floats]) -> Floats:
    """Population std [R] float64 of each reward over all leaves of an iteration except anchors, [R, Q] per prompt.

    It is Flow-GRPO's spread, independent of the number of ranks. Missing scores are omitted.
    """
    parts = [part[:, tree.tag != ANCHOR] for tree, part in zip(trees, scores, strict=True)]
    present = [row[np.isfinite(row)] for row in np.concatenate(parts, axis=1).astype(np.float64)]
    return np.array([row.std() if len(row) else np.nan for row in present])
