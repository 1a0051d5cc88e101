"""The mathematics of G²RPO (arXiv 2510.01982): torch and the standard library only, usable without the rest."""

from g2rpo_ray.algo.advantage import complete_members, integrate_advantages, without_spread
from g2rpo_ray.algo.branching import AnchorTrajectory, BranchPlan, Velocity, complete, run_anchor
from g2rpo_ray.algo.kernels import Transition, ode_step, transition
from g2rpo_ray.algo.loss import clipped_loss, reference_kl
from g2rpo_ray.algo.schedule import completion_path, resolution_shift, shifted_sigmas

__all__ = [
    "AnchorTrajectory",
    "BranchPlan",
    "Transition",
    "Velocity",
    "clipped_loss",
    "complete",
    "complete_members",
    "completion_path",
    "integrate_advantages",
    "ode_step",
    "reference_kl",
    "resolution_shift",
    "run_anchor",
    "shifted_sigmas",
    "transition",
    "without_spread",
]
