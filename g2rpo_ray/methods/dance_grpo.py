"""DanceGRPO (arXiv 2505.07818): chains from one initial noise, a constant diffusion, a random part of it trained.

12 chains, g = η = .3 on all steps but the last, whose noise its image does not have: the image is the last estimate of
x0, which is an ODE step. Of a chain's T − 1 steps 60 % are trained, drawn for each member; the advantage is the z-score
within the prompt, over all members; ε 1e-4.

Table and code (XueZeyue/DanceGRPO) differ: papers that compare with it say four updates a rollout, its script (12
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
