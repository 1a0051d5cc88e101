"""Objectives: tensors in, (scalar, metrics) out; no collectives, the denominator is passed in.

With ρ = exp(new − old) of an edge's log-probability and A its advantage:

    clip       max(−Aρ, −A clip(ρ, 1 − ε, 1 + ε))                                   Flow-GRPO, DanceGRPO, MixGRPO, G²RPO
    guard      the same with ρ = exp(std [new − old + d]), over |σ_b − σ_a|         GRPO-Guard
    dppo       −Aρ, 0 where d ≥ 1e-5 and the edge moves away from the old policy
    reinforce  −A exp(new − stop(new)), of the edge and of its subpaths             Pave-GRPO

d = mean (μ − μ_old)² / (2 std²) is the edge's drift.

Your own, as `package.module:name`, is a function of `new_log_prob`, `old_log_prob` and `advantage` to losses, [E] each;
it may have further arguments called `clip_range`, `std`, `drift` and `delta`: see `edge_losses`.
"""

from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor

from g2rpo_ray.imports import named

OBJECTIVES = ("clip", "guard", "dppo", "reinforce")
MAX_DRIFT = 1e-5  # of `dppo`


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

    Returns:
        [E].

    Raises:
        ValueError: an unknown objective.
    """
    if own := _own(objective):
        given = {"clip_range": clip_range, "std": std, "drift": drift, "delta": delta}
        asked = {name: value for name, value in given.items() if name in signature(own).parameters}
        losses: Tensor = own(new_log_prob, old_log_prob, advantage, **asked)
        return losses
    ratio = edge_ratios(objective, new_log_prob, old_log_prob, std=std, drift=drift)
    if objective in ("clip", "guard"):
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
        return surrogate / delta.abs() if objective == "guard" and delta is not None else surrogate
    if objective == "reinforce":
        return -advantage * (new_log_prob - new_log_prob.detach()).exp()
    cut = cut_off(objective, ratio, advantage, clip_range=clip_range, drift=drift)
    return torch.where(cut, 0, -advantage * ratio)


def needs_drift(objective: str) -> bool:
    """True if the objective uses the drift of edges."""
    own = _own(objective)
    return "drift" in signature(own).parameters if own else objective in ("guard", "dppo")


def _own(objective: str) -> Callable[..., Tensor] | None:
    """The user's own function of an objective, or None."""
    known: dict[str, Callable[..., Tensor] | None] = dict.fromkeys(OBJECTIVES)
    return named("objective", objective, known)


def cut_off(
    objective: str, ratio: Tensor, advantage: Tensor, *, clip_range: float, drift: Tensor | None = None
) -> Tensor:
    """Bool [E]: edges whose loss has no gradient, because they are at the limit of the objective.

    Args:
        ratio, advantage: [E].
        clip_range: ε, of `clip` and `guard`.
        drift: [E], of `dppo`.
    """
    if objective == "reinforce" or _own(objective):
        return torch.zeros_like(ratio, dtype=torch.bool)
    if objective == "dppo":
        assert drift is not None, "dppo needs the drift"
        return (drift.detach() >= MAX_DRIFT) & ((ratio - 1) * advantage > 0)
    return (ratio - 1) * advantage > clip_range * advantage.abs()


def edge_ratios(
    objective: str,
    new_log_prob: Tensor,
    old_log_prob: Tensor,
    *,
    std: Tensor | None = None,
    drift: Tensor | None = None,
) -> Tensor:
    """The ratio ρ [E] of each edge, as defined by the objective."""
    _own(objective)  # raises for one that is not known
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
        valid: bool [E], edges that count. Default: all.
        denominator: number of edges of the whole batch. Default: the valid ones of this call.
        weight: [E]. Default: 1.

    Returns:
        The loss, and the metrics `ratio_mean` and `clip_fraction` over the same denominator, to be summed over parts
        of a batch, and `ratio_max_dev`, the largest |ρ − 1|.
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
    """(μ − μ')² / (2 std²) averaged over all dimensions but the first, [N]: the KL of two Gaussian steps of equal std.

    With the reference's mean it is the KL penalty, with the old policy's mean an edge's drift.
    """
    return ((mean - other) ** 2).flatten(1).mean(1) / (2 * std**2)
