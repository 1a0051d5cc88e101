"""A cheaper G²RPO: two consecutive branch steps, and two evaluations to complete each branch.

Branches at two steps from .3 of the schedule on (3 and 4 of 10, 5 and 6 of 16), 12 children each. One stride of .8 of
the steps, so that a completion has one evaluation below its edge and one at .8 of the steps. The rest as in G²RPO.

Not of a paper. The error of a coarse completion is noise that averages out over prompts, and the policy's likelihood
comes from exact evaluations: docs/methods.md, "Coarse completions".
"""

from g2rpo_ray.methods import Settings

STEPS = 10


def preset(steps: int) -> Settings:
    first = min(round(0.3 * steps), max(0, steps - 2))
    return {
        "sampler": {
            "branch_steps": [*range(first, min(first + 2, steps))], "strides": [max(1, round(0.8 * steps))],
        },
        "learner": {"schedule": "per_step"},
    }  # fmt: skip
