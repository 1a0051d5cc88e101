"""Advantage Weighted Matching, AWM (arXiv 2509.25050): minus the flow matching loss replaces the log-probability.

24 initial noises a prompt, sampled by ODE without CFG. The advantage is the image's score minus its prompt's mean, over
the std of all scores of the iteration; it weights the matching loss at six noise levels, one in each sixth of the
sampler's schedule; `ghuber` weighting. One optimizer step a rollout, so that the ratio is 1 and its clip (ε 1) has no
effect. Two penalties: the squared differences in velocity to the base and to an average of the policy, whose decay is
n / 1000 after n rollouts, at most .3.

Code (scxue/advantage_weighted_matching): T = 14. It divides advantages by 5, which this package does not: its penalty
weights 1e-4 (PickScore; GenEval .001, OCR .003) and 1 are 5e-4 (.005, .015) and 5 here, which is equal before gradient
clipping. Noise levels are of the first int(.9 T) steps, 0..11 (GenEval and OCR: 1..11). It samples by SA-Solver, here
Euler. It evaluates an average of the weights (`learner.ema` .99).
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
