"""Flow-GRPO (arXiv 2505.05470): every step is stochastic; each member is a chain from noise to image.

24 initial noises a prompt (one, with `roots: 1` and `group_size: 24`, is the code's `same_latent`), flow kernel, T = 6
and η .9 for FLUX (T = 10 and η .7 for SD3.5). The image's score minus its prompt's mean, over the std of all scores of
the iteration, is the advantage of each of its steps but the last, which is not trained; ε 1e-4; two updates a rollout.

Paper and code (yifan123/flow_grpo) differ: the KL's β is .04 (GenEval, OCR) or .01 (PickScore) in the current code,
whose std lacks √|Δσ|. With the paper's std, which this package uses, that is .004 or .001; 0 for FLUX. The code drops
prompts whose scores are equal.
"""

from g2rpo_ray.methods import Settings

STEPS = 6


def preset(steps: int) -> Settings:
    return {
        "sampler": {
            "eta": 0.9, "roots": 24, "group_size": 1, "stochastic_edges": steps, "untrained": [steps - 1],
        },
        "credit": {"group": "step", "spread": "batch"},
        "learner": {"updates_per_rollout": 2},
    }  # fmt: skip
