"""TempFlow-GRPO (arXiv 2508.04324): G²RPO's branching from several initial noises, and steps weighted by their noise.

Four initial noises a prompt, six children at every step but the last, flow kernel, η .7 (FLUX: .9); advantages within
the siblings of one branch point; an edge's loss times 1.73 times the std of its step; ε 1e-4; two updates a rollout.

Paper and code (Shredded-Pork/TempFlow-GRPO) differ: the code divides by the population std + 1e-4, this package by the
unbiased std + 1e-8; its KL has β .004 (FLUX, GenEval) or .001, here 0. Grouping by prompt (`credit.group: step`) is in
its code, commented out.
"""

from g2rpo_ray.methods import Settings

STEPS = 10


def preset(steps: int) -> Settings:
    return {
        "sampler": {"roots": 4, "group_size": 6, "branch_steps": [*range(max(1, steps - 1))]},
        "learner": {"edge_weight": 1.73, "updates_per_rollout": 2},
    }
