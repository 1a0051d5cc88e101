"""E-GRPO (arXiv 2601.00423): G²RPO whose stochastic edges span several steps, as one step's noise tells too little.

Each of the first half of the steps branches off the anchor by one edge of two steps, 12 children, flow kernel, η .7;
Λ = {1, 2}, walked as the released code does; credit and schedule as G²RPO's; ε 1e-4.

Paper and code (shengjun-zhang/VisualGRPO) differ: the paper chooses the length of each edge by its entropy (threshold
2.2, in a unit that it does not state; HPSv2.1 .391), and has .382 for edges of two steps, which are what we have, .374
for four; the code's lists are to be filled in by hand. Λ = {1, 2} and its layout (`authors`) are the code's: the paper
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
