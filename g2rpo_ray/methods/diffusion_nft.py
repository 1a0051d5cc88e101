"""DiffusionNFT (arXiv 2509.16117): images sampled by ODE, trained on where they are noisy again. No step is stochastic.

24 initial noises a prompt, without CFG; the image's z-score within its prompt, over the std of all scores of the
iteration, clamped to ±5, is r = A / 10 + ½; the velocity is pulled toward the image by r and away, through its mirror
image in v_old, by 1 − r; β 1; 1e-4 times the squared difference to the base. Noise levels are the sampler's own, all
but one of them an image. One optimizer step a rollout. The policy that samples is an average: it keeps n / 1000 of
itself after n steps, at most a half.

Code (NVlabs/DiffusionNFT): T = 10 for GenEval, PickScore and HPSv2.1, 25 for several rewards; with several rewards or
OCR β is .1, and OCR has two steps a rollout and the average's schedule [75, .0075, .999]. It samples by DPM-Solver++ of
order 2, here Euler; it draws an image's noise levels without replacement, here stratified. It evaluates an average of
the weights (`learner.ema` .9).
"""

from g2rpo_ray.methods import Settings

STEPS = 10


def preset(steps: int) -> Settings:
    return {
        "sampler": {"kernel": "ode", "roots": 24, "group_size": 1},
        "credit": {"group": "step", "spread": "batch"},
        "learner": {
            "objective": "nft", "draws": max(1, steps - 1), "kl_beta": 1e-4, "old_decay": [0, 0.001, 0.5],
        },
    }  # fmt: skip
