"""MixGRPO (arXiv 2507.21802): a window of four stochastic steps slides along the schedule, the rest is ODE.

12 members from one initial noise, flow kernel, η .7. The window moves by one step every 25 iterations, and from the
last position back to the first; all four steps are trained. Z-score within the prompt, separately for each reward;
ε 1e-4; four updates a rollout.

Paper and code (Tencent-Hunyuan/MixGRPO) differ: in the code the window shrinks at the end, is empty for 25 iterations,
and never reaches the last two steps; weights of several rewards are normalised to a sum of one. Other strategies of the
paper are `sampler.branch_schedule: draw` (random) and `fixed` (frozen).
"""

from g2rpo_ray.methods import Settings

STEPS = 25


def preset(steps: int) -> Settings:
    return {
        "sampler": {"branch_schedule": "slide", "slide_every": 25, "stochastic_edges": min(4, steps)},
        "credit": {"group": "step"},
        "learner": {"updates_per_rollout": 4},
    }
