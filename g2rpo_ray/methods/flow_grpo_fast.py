"""Flow-GRPO-Fast, as its authors recommend it without guidance: two stochastic steps in a window drawn for each prompt.

24 initial noises, ODE to a step below T/2 that is drawn for each prompt, two stochastic steps of Flow-CPS's kernel
(arXiv 2509.05952; η .8), ODE to the image; credit as in Flow-GRPO; ε 1e-5; two updates a rollout.

Text and code (yifan123/flow_grpo) differ: its README gives two steps, its configurations three, from a start in
0..T/2 − 3. The code draws a window for each batch of a process, so that members of one prompt have different windows.
"""

from g2rpo_ray.methods import Settings

STEPS = 10


def preset(steps: int) -> Settings:
    return {
        "sampler": {
            "kernel": "cps", "eta": 0.8, "roots": 24, "group_size": 1, "stochastic_edges": 2,
            "branch_steps": [*range(max(1, steps // 2))], "branch_schedule": "draw",
        },
        "credit": {"group": "step", "spread": "batch"},
        "learner": {"clip_range": 1e-5, "updates_per_rollout": 2},
    }  # fmt: skip
