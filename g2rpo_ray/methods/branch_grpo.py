"""BranchGRPO (arXiv 2509.06040): stochastic chains that split, so that members share their first steps.

Two children of one noise, and two again at steps 3, 6 and 9 of 20: 16 images; g = η = .3 on all steps but the last, as
in DanceGRPO. The value of an edge is the mean score of the images below it, its advantage the z-score among the edges
of its depth; ε 1e-3.

Paper and code (Fredreic1849/BranchGRPO) differ: the paper weights leaves by the probability of their paths, the script
takes the mean. The script multiplies the noise of splits by 4 but not in their log-probability, and trains the last
step, whose noise the image does not contain; this preset does neither. It makes an optimizer step after every 12 edges,
this preset four updates.
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
