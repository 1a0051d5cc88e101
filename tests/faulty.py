"""Rewards that fail, by import path, as a user's own would."""

import time

import numpy as np


class Faulty:
    """Brightness; the first `errors` calls raise, and image number `missing` of a call has no score.

    `returns`: Python for what a call returns in place of scores.
    """

    def __init__(self, errors, missing, returns):
        self.errors, self.missing, self.returns, self.calls = errors, missing, returns, 0

    def score(self, images, prompts):
        self.calls += 1
        if self.calls <= self.errors:
            raise RuntimeError(f"call {self.calls} fails")
        if self.returns is not None:
            return eval(self.returns)
        scores = images.mean((1, 2, 3)).astype(np.float32)
        if self.missing is not None and self.missing < len(scores):
            scores[self.missing] = np.nan
        return scores


def build(errors=0, missing=None, returns=None):
    return Faulty(errors, missing, returns)


class Told:
    """The `count` in a prompt's metadata; no score without it."""

    def score(self, images, prompts, metadata):
        return np.array([known.get("count", np.nan) for known in metadata], np.float32)


def build_told():
    return Told()


class Rank:
    """A picture's place by brightness among all that it is given, whose number is in `sizes`."""

    scope = "group"

    def score(self, images, prompts):
        return images.mean((1, 2, 3)).argsort().argsort().astype(np.float32) + 100 * len(images)


def build_rank():
    return Rank()


class Drifting:
    """Other scores at every call, as of a model that draws something."""

    def score(self, images, prompts):
        return np.random.default_rng().normal(size=len(images)).astype(np.float32)


def build_drifting():
    return Drifting()


def broken():
    raise ValueError("taste: no such thing")


class Sleeper:
    def score(self, images, prompts):
        time.sleep(1000)


def build_sleeper():
    return Sleeper()
