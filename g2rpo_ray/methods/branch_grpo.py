"""BranchGRPO (arXiv 2509.06040): stochastic chains that split on their way, so that members share what is before.

Two children of one noise, and two again at steps 3, 6 and 9 of 20: 16 images; g = η = .3 on all steps but the last, as
DanceGRPO; the value of an edge is the mean of the images below it, its advantage the z-score among the edges of its
depth; ε 1e-3.

Paper and code (Fredreic1849/BranchGRPO) differ: the paper weighs leaves by the probability of their paths, the released
script takes the mean; the script multiplies the noise of splits by 4 and scores them as if it had not, and trains the
last step, whose noise the image does not have: neither is done here. It steps after every 12 edges; four updates here.
"""

from g2rpo_ray.methods import Settings

STEPS = 20


def preset(steps: int) -> Settings:
    return {
        "sampler": {
            "kernel": "dance", "eta": 0.3, "group_size": 2, "stochastic_edges": max(1, steps - 1),
            "splits": sorted({steps * twentieths // 20 for twentieths in (3, 6, 9)} - {0}), "width": 2,
        },
        "credit": {"group": "step"},
        "learner": {"clip_range": 1e-3, "updates_per_rollout": 4},
    }  # fmt: skip
