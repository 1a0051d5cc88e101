"""E-GRPO (arXiv 2601.00423): G²RPO with stochastic edges of several steps, which carry more entropy than one step.

Each of the first half of the steps branches off the anchor by one edge of two steps, 12 children, flow kernel, η .7;
Λ = {1, 2} in the layout of the released code; credit and schedule as in G²RPO; ε 1e-4.

Paper and code (shengjun-zhang/VisualGRPO) differ: the paper chooses the length of each edge by its entropy (threshold
2.2, in a unit that it does not state; HPSv2.1 .391); it reports .382 for edges of two steps, as here, and .374 for
four. The code's lists of lengths are set by hand. Λ = {1, 2} and its layout (`authors`) are from the code: the paper
has no granularities.
"""

from g2rpo_ray.methods import Settings

STEPS = 16


def preset(steps: int) -> Settings:
    length = min(2, steps)
    return {
        "sampler": {
            "branch_steps": [*range(min(max(1, steps // 2), steps - length + 1))], "edge_length": length,
            "strides": [1, 2], "layout": "authors",
        },
        "learner": {"schedule": "per_step"},
    }  # fmt: skip
