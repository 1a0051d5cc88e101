"""Objectives: tensors in, (scalar, metrics) out; no collectives, the denominator is passed in.

With ρ = exp(new − old) of an edge's log-probability and A its advantage:

    clip       max(−Aρ, −A clip(ρ, 1 − ε, 1 + ε))                                   Flow-GRPO, DanceGRPO, MixGRPO, G²RPO
    guard      the same with ρ = exp(std [new − old + d]), over |σ_b − σ_a|         GRPO-Guard
    dppo       −Aρ, 0 where d ≥ 1e-5 and the edge moves away from the old policy
    reinforce  −A exp(new − stop(new)), of the edge and of its subpaths             Pave-GRPO

d = mean (μ − μ_old)² / (2 std²) is the edge's drift.
"""

import torch
from torch import Tensor

OBJECTIVES = ("clip", "guard", "dppo", "reinforce")
NEEDS_DRIFT = ("guard", "dppo")
MOST_DRIFT = 1e-5  # of `dppo`


def edge_losses(
    objective: str,
    new_log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    std: Tensor | None = None,
    drift: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """The loss of each edge, before any weight.

    Args:
        new_log_prob, old_log_prob, advantage: [E]; only `new_log_prob` and `drift` carry a gradient.
        clip_range: ε.
        std: [E] of the step, for `guard`.
        drift: [E], d above, for `guard` and `dppo`.
        delta: [E], σ_b − σ_a, for `guard`.

    Raises:
        ValueError: an unknown objective.
    """
    ratio = edge_ratios(objective, new_log_prob, old_log_prob, std=std, drift=drift)
    if objective in ("clip", "guard"):
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
        return surrogate / delta.abs() if objective == "guard" and delta is not None else surrogate
    if objective == "reinforce":
        return -advantage * (new_log_prob - new_log_prob.detach()).exp()
    assert drift is not None, "dppo needs the drift"
    moves_away = (ratio - 1) * advantage > 0
    return torch.where((drift.detach() >= MOST_DRIFT) & moves_away, 0, -advantage * ratio)


def edge_ratios(
    objective: str,
    new_log_prob: Tensor,
    old_log_prob: Tensor,
    *,
    std: Tensor | None = None,
    drift: Tensor | None = None,
) -> Tensor:
    """ρ of each edge, [E], as the objective has it."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} given; allowed are {', '.join(OBJECTIVES)}")
    if objective == "guard":
        assert std is not None, "guard needs the std of the steps"
        assert drift is not None, "guard needs the drift"
        return (std * (new_log_prob - old_log_prob + drift)).exp()
    return (new_log_prob - old_log_prob).exp()


def policy_loss(
    objective: str,
    new_log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    valid: Tensor | None = None,
    denominator: float | None = None,
    weight: Tensor | None = None,
    std: Tensor | None = None,
    drift: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · `edge_losses` / denominator, over the valid edges.

    Args:
        valid: bool [E], edges that count; default all.
        denominator: edges of the whole batch that this call is a part of; default: the valid ones given here.
        weight: [E], default 1.

    Returns:
        The loss, and `ratio_mean` and `clip_fraction` over the same denominator (so that parts of a batch add up),
        and `ratio_max_dev`, the largest |ρ − 1| (the parts' maximum).
    """
    valid = torch.ones_like(advantage, dtype=torch.bool) if valid is None else valid
    total = max(float(valid.sum()) if denominator is None else denominator, 1.0)
    # masked before exp: a masked edge has no gradient
    new, old = (torch.where(valid, log_prob, 0) for log_prob in (new_log_prob, old_log_prob))
    moved = None if drift is None else torch.where(valid, drift, 0)
    losses = edge_losses(objective, new, old, advantage, clip_range=clip_range, std=std, drift=moved, delta=delta)
    losses = losses if weight is None else weight * losses
    loss = torch.where(valid, losses, 0).sum() / total
    ratio = edge_ratios(objective, new, old, std=std, drift=moved).detach()
    deviation = torch.where(valid, (ratio - 1).abs(), 0)
    return loss, {
        "ratio_mean": torch.where(valid, ratio, 0).sum() / total,
        "clip_fraction": (deviation > clip_range).sum() / total,
        "ratio_max_dev": deviation.max(),
    }


def mean_shift(mean: Tensor, other: Tensor, std: float) -> Tensor:
    """(μ − μ')² / (2 std²) averaged over all dimensions but the first, [N]: the KL of two Gaussian steps of one std.

    Against the reference's mean it is the KL penalty, against the old policy's an edge's drift.
    """
    return ((mean - other) ** 2).flatten(1).mean(1) / (2 * std**2)
