"""G²RPO (arXiv 2510.01982): branches of one stochastic step off a deterministic anchor, completed at several strides.

The first half of the steps branch (0..7 of 16), 12 children each, flow kernel, η .7, Λ = {1, 2, 3}; advantages within
the siblings of one branch point; an optimizer step after each branch step (the released code has both); ε 1e-4.

Paper and code (bcmi/Granular-GRPO) differ: the code has Λ = {1, 2}, and completes images in another layout
(`sampler.layout: authors`).
"""

from g2rpo_ray.methods import Settings

STEPS = 16


def preset(steps: int) -> Settings:
    return {
        "sampler": {"branch_steps": [*range(max(1, steps // 2))], "strides": [1, 2, 3]},
        "learner": {"schedule": "per_step"},
        "evaluation": {"anchors": True},  # the paper reports these; 5 % of the cost
    }
