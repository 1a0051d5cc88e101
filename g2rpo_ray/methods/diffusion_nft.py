"""DiffusionNFT (arXiv 2509.16117): images are sampled by ODE, and noised again for training. No step is stochastic.

24 initial noises a prompt, without CFG. The advantage A is the image's score minus its prompt's mean, over the std of
all scores of the iteration, clamped to ±5; r = A / 10 + ½. The loss of the velocity v has weight r, that of its mirror
image 2 v_old − v weight 1 − r; β 1; KL 1e-4 times the squared difference to the base. An image is trained at T − 1 of
the sampler's T noise levels. One optimizer step a rollout. The sampling policy is an average with decay n / 1000 after
n steps, at most a half.

Code (NVlabs/DiffusionNFT): T = 10 for GenEval, PickScore and HPSv2.1, 25 for several rewards. With several rewards or
OCR β is .1; OCR has two steps a rollout and the decay schedule [75, .0075, .999]. It samples by DPM-Solver++ of order
2, here Euler. It draws an image's noise levels without replacement, here stratified. It evaluates an average of the
weights (`learner.ema` .9).
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
