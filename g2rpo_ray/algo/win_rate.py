"""Win rates inside a group (Pref-GRPO, arXiv 2508.20751). Legend: N images of a group."""

import numpy as np
from numpy.typing import NDArray


def shares(won: NDArray[np.float64]) -> NDArray[np.float32]:
    """Float32 [N]: the mean over its comparisons of won [..., N, N], by row; NaN where an image was in none."""
    there = np.isfinite(won)
    axes = (*range(won.ndim - 2), won.ndim - 1)
    count = there.sum(axis=axes)
    total = np.where(there, won, 0).sum(axis=axes)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def win_rates(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Float32 [N]: the share of the others that each of scores [N] beats, ties half.

    A missing score stays missing, and is in no comparison; so is one that none is left to be compared with.
    """
    won = (np.sign(np.subtract.outer(scores, scores).astype(np.float64)) + 1) / 2
    np.fill_diagonal(won, np.nan)
    return shares(won)
