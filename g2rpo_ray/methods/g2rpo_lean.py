"""G²RPO where it costs least: two branch steps in a row, each branch completed by two evaluations.

Branches at two steps from .3 of the schedule on (3 and 4 of 10, 5 and 6 of 16), 12 children each; one stride as long as
.8 of the steps, so that a completion has an evaluation below its edge, and one at .8 of the steps; the rest as G²RPO's.

Not of a paper. What a coarse completion gets wrong about one sample is noise, which averages out over prompts, and the
policy's own likelihood rests on exact evaluations either way: docs/methods.md, "Coarse completions".
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
