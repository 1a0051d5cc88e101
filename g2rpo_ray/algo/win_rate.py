"""Win rates inside a group (Pref-GRPO, arXiv 2508.20751). Legend: N images of a group."""

import numpy as np
from numpy.typing import NDArray


def shares(won: NDArray[np.float64]) -> NDArray[np.float32]:
    """Win rates float32 [N]: row means of the comparisons won [..., N, N]; NaN for an image without comparisons."""
    there = np.isfinite(won)
    axes = (*range(won.ndim - 2), won.ndim - 1)
    count = there.sum(axis=axes)
    total = np.where(there, won, 0).sum(axis=axes)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def win_rates(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Win rates float32 [N]: the share of the others that each of scores [N] beats; a tie counts half.

    A missing score stays missing and is not compared. A score without any comparison is NaN.
    """
    won = (np.sign(np.subtract.outer(scores, scores).astype(np.float64)) + 1) / 2
    np.fill_diagonal(won, np.nan)
    return shares(won)
