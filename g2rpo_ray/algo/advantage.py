"""Multi-granularity advantage integration: rewards normalised within each group and granularity, then summed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def integrate_advantages(
    rewards: Tensor,
    *,
    valid: Tensor | None = None,
    reward_weights: Sequence[float] | None = None,
    granularity_weights: Sequence[float] | None = None,
    clip: float | None = 5.0,
) -> Tensor:
    """A^mix[i, g] = Σ_r w_r Σ_j w_j (R − mean_g R) / (std_g R + 1e-8), clamped to ±clip (G²RPO, section 3.3).

    Args:
        rewards: [R, M, J, G].
        valid: bool [R, M, J, G], default: where the reward is finite. A missing score is left out of its group's
            mean and unbiased std; its member has no whole advantage and gets 0 (see `complete_members`).
        reward_weights, granularity_weights: R and J numbers, all 1 by default.

    Returns:
        [M, G], in the dtype of `rewards`. A group without spread, or of fewer than two scores, has advantage 0.
    """
    valid = torch.isfinite(rewards) if valid is None else valid
    values = torch.where(valid, rewards, 0).double()
    count = valid.sum(-1, keepdim=True)
    mean = values.sum(-1, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(valid, values - mean, 0)
    std = (deviation.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    normal = torch.where(without_spread(rewards, valid)[..., None], 0, deviation / (std + 1e-8))
    for weights, shape in ((reward_weights, (-1, 1, 1, 1)), (granularity_weights, (1, 1, -1, 1))):
        if weights is not None:
            normal = normal * torch.as_tensor(weights, dtype=normal.dtype, device=normal.device).view(shape)
    mixed = torch.where(complete_members(valid), normal.sum((0, 2)), 0)
    return (mixed if clip is None else mixed.clamp(-clip, clip)).to(rewards.dtype)


def complete_members(valid: Tensor) -> Tensor:
    """Bool [M, G]: the members all of whose scores [R, M, J, G] are there. The others take no part in the loss."""
    return valid.all(2).all(0)


def without_spread(rewards: Tensor, valid: Tensor) -> Tensor:
    """Bool [R, M, J]: groups whose valid scores are all the same number, or fewer than two.

    Told from the largest and smallest score: the rounding of a mean would turn equal scores into noise of size one.
    """
    infinity = torch.tensor(torch.inf, dtype=rewards.dtype, device=rewards.device)
    highest = torch.where(valid, rewards, -infinity).amax(-1)
    lowest = torch.where(valid, rewards, infinity).amin(-1)
    return highest <= lowest
