"""Advantage Weighted Matching, AWM (arXiv 2509.25050): the log-probability of an image is its flow matching loss.

24 initial noises a prompt, sampled by ODE without CFG; the image's z-score within its prompt, over the std of all
scores of the iteration, weights the matching loss at six noise levels, each of an equal part of the sampler's schedule;
`ghuber` weighting; one optimizer step a rollout, so that the ratio is 1 and its clip (ε 1) without effect; squared
differences in velocity to the base, and to an average of the policy that keeps n / 1000 of itself after n rollouts, at
most .3.

Code (scxue/advantage_weighted_matching): T = 14; advantages are divided by 5, so that its weights of the two
differences, 1e-4 (PickScore; GenEval .001, OCR .003) and 1, are 5e-4 (.005, .015) and 5 here, where they are not;
before gradients are clipped that is the same. Noise levels are of the first int(.9 T) steps, 0..11 (GenEval and OCR:
1..11). It samples by SA-Solver, here Euler. It evaluates an average of the weights (`learner.ema` .99).
"""

from g2rpo_ray.methods import Settings

STEPS = 14


def preset(steps: int) -> Settings:
    trained = max(1, int(0.9 * steps))
    return {
        "sampler": {"kernel": "ode", "roots": 24, "group_size": 1, "untrained": [*range(trained, steps)]},
        "credit": {"group": "step", "spread": "batch"},
        "learner": {
            "objective": "awm_ghuber", "draws": 6, "clip_range": 1.0, "kl_beta": 5e-4, "old_decay": [0, 0.001, 0.3],
            "old_kl": 5.0,
        },
    }  # fmt: skip
