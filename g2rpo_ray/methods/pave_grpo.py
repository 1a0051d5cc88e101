"""Pave-GRPO (arXiv 2606.01636): an edge is trained along finer paths to the same end as well.

Steps 0, 2, 4 and 6 of 16 branch, 12 members, flow kernel, η .8; advantages within siblings. The loss is −A exp(lp −
stop(lp)), without a ratio to clip, of the edge itself and, with weight ½ each, of the paths of n − 1 ODE substeps and
the rest, n = 2 and 3: substeps even in sigma, the rest with the std of its own length, gradients through all of them.
One optimizer step a rollout.

Code: Bujiazi/GRPO-Series, the source of these numbers; of the paper only the abstract was available.
"""

from g2rpo_ray.methods import Settings

STEPS = 16


def preset(steps: int) -> Settings:
    return {
        "sampler": {"eta": 0.8, "branch_steps": [*range(0, max(1, steps // 2), 2)]},
        "learner": {"objective": "reinforce", "subpaths": [2, 3]},
    }
