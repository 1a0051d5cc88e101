"""DanceGRPO (arXiv 2505.07818): chains from one initial noise, constant diffusion, training on a random part of steps.

12 chains, g = η = .3 on all steps but the last: the image is the last estimate of x0, which is an ODE step. Of a
chain's T − 1 steps 60 % are trained, drawn for each member. The advantage is the z-score within the prompt, over all
members; ε 1e-4.

Table and code (XueZeyue/DanceGRPO) differ: papers that compare with it give four updates a rollout, its script (12
members, accumulation over 4) makes three; four here.
"""

from g2rpo_ray.methods import Settings

STEPS = 16


def preset(steps: int) -> Settings:
    return {
        "sampler": {"kernel": "dance", "eta": 0.3, "stochastic_edges": max(1, steps - 1), "trained_share": 0.6},
        "credit": {"group": "step"},
        "learner": {"updates_per_rollout": 4},
    }
