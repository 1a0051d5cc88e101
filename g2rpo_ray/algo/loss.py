"""The clipped policy gradient: tensors in, (scalar, metrics) out; no collectives, the denominator is passed in."""

import torch
from torch import Tensor


def clipped_loss(
    new_log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    valid: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ max(−Aρ, −A clip(ρ, 1 − ε, 1 + ε)) / denominator with ρ = exp(new − old), over the valid entries.

    Args:
        new_log_prob, old_log_prob, advantage: of one shape; only `new_log_prob` carries a gradient.
        valid: bool of that shape: entries that count; default all.
        denominator: entries of the whole batch that this call is a part of; default: the valid ones given here.

    Returns:
        The loss, and `ratio_mean` and `clip_fraction` over the same denominator (so that parts of a batch add up),
        and `ratio_max_dev`, the largest |ρ − 1| (the parts' maximum).
    """
    valid = torch.ones_like(advantage, dtype=torch.bool) if valid is None else valid
    total = float(valid.sum()) if denominator is None else denominator
    log_ratio = torch.where(valid, new_log_prob - old_log_prob, 0)  # masked before exp: a masked entry has no gradient
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
    loss = torch.where(valid, surrogate, 0).sum() / max(total, 1.0)
    deviation = torch.where(valid, (ratio - 1).abs(), 0).detach()
    return loss, {
        "ratio_mean": torch.where(valid, ratio, 0).detach().sum() / max(total, 1.0),
        "clip_fraction": (deviation > clip_range).sum() / max(total, 1.0),
        "ratio_max_dev": deviation.max(),
    }


def reference_kl(mean: Tensor, reference_mean: Tensor, std: float) -> Tensor:
    """KL of two Gaussian steps of one std, [N]: (μ − μ_ref)² / (2 std²) averaged over all dimensions but the first."""
    return ((mean - reference_mean) ** 2).flatten(1).mean(1) / (2 * std**2)
