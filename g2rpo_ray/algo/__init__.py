"""The mathematics of sampling trees (G²RPO, arXiv 2510.01982, and its field): torch alone, usable without the rest."""

from g2rpo_ray.algo.budget import Choice, Measured, agreeing, ladder, mattering, measure, pooled
from g2rpo_ray.algo.credit import (
    batch_std,
    compared_leaves,
    edge_advantages,
    edge_values,
    groups,
    normalise,
    scored_edges,
    without_spread,
)
from g2rpo_ray.algo.forward import (
    AWM,
    FORWARD,
    awm_log_probs,
    nft_losses,
    noise_levels,
    renoised,
    stratified,
    velocity_shift,
)
from g2rpo_ray.algo.growth import Grown, Velocity, grow, integrate
from g2rpo_ray.algo.kernels import Transition, ode_step, step_between, transition
from g2rpo_ray.algo.objectives import NEEDS_DRIFT, OBJECTIVES, edge_losses, edge_ratios, mean_shift, policy_loss
from g2rpo_ray.algo.schedule import completion_path, resolution_shift, shifted_sigmas
from g2rpo_ray.algo.signal import agreement, spreads
from g2rpo_ray.algo.tree import ANCHOR, Shape, Subtree, Tree, plan_tree

__all__ = [
    "ANCHOR",
    "AWM",
    "FORWARD",
    "NEEDS_DRIFT",
    "OBJECTIVES",
    "Choice",
    "Grown",
    "Measured",
    "Shape",
    "Subtree",
    "Transition",
    "Tree",
    "Velocity",
    "agreeing",
    "agreement",
    "awm_log_probs",
    "batch_std",
    "compared_leaves",
    "completion_path",
    "edge_advantages",
    "edge_losses",
    "edge_ratios",
    "edge_values",
    "groups",
    "grow",
    "integrate",
    "ladder",
    "mattering",
    "mean_shift",
    "measure",
    "nft_losses",
    "noise_levels",
    "normalise",
    "ode_step",
    "plan_tree",
    "policy_loss",
    "pooled",
    "renoised",
    "resolution_shift",
    "scored_edges",
    "shifted_sigmas",
    "spreads",
    "step_between",
    "stratified",
    "transition",
    "velocity_shift",
    "without_spread",
]
