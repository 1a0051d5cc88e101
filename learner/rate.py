"""The learning rate of each iteration: a linear warm-up, then constant, linear or cosine (half a period) to 0."""

import math

from g2rpo_ray.config import LearnerConfig


def learning_rate(learner: LearnerConfig, iteration: int, iterations: int) -> float:
    """The learning rate of an iteration's optimizer steps.

    With warm-up w and n iterations: lr · (i + 1) / (w + 1) for i < w; then lr times 1, 1 − p or
    (1 + cos π p) / 2 with p = (i − w) / (n − w). It is lr just after the warm-up, and above 0 in the last iteration.

    Args:
        learner: settings.
        iteration: i, counted from 0.
        iterations: of the run; `learner.lr_iterations` has precedence.
    """
    last, warm = learner.lr_iterations or iterations, learner.warmup
    if iteration < warm:
        return learner.lr * (iteration + 1) / (warm + 1)
    progress = (iteration - warm) / max(last - warm, 1)
    falls = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return learner.lr * falls[learner.lr_schedule]
