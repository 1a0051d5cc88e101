"""The learning rate of each iteration: a linear warm-up, then constant, or falling to 0 (linear, or half a cosine)."""

import math

from g2rpo_ray.config import LearnerConfig


def learning_rate(learner: LearnerConfig, iteration: int, iterations: int) -> float:
    """Of the optimizer steps of an iteration, counted from 0.

    With warm-up w and n iterations in all: lr · (i + 1) / (w + 1) for i < w; then lr times 1, 1 − p or
    (1 + cos π p) / 2 with p = (i − w) / (n − w): all of it just after the warm-up, not yet 0 in the last iteration.

    Args:
        iterations: of the run; `learner.lr_iterations` goes before.
    """
    last, warm = learner.lr_iterations or iterations, learner.warmup
    if iteration < warm:
        return learner.lr * (iteration + 1) / (warm + 1)
    progress = (iteration - warm) / max(last - warm, 1)
    falls = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return learner.lr * falls[learner.lr_schedule]
