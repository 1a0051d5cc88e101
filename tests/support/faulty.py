"""Rewards that fail, by import path, as a user's own would."""

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

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


class Arithmetic:
    """1 where float32 is not rounded to TF32, plus 2 where torch takes deterministic kernels."""

    def score(self, images, prompts):
        import torch

        exact = not torch.backends.cudnn.allow_tf32
        return np.full(len(images), exact + 2 * torch.are_deterministic_algorithms_enabled(), np.float32)


def build_arithmetic():
    return Arithmetic()


ERRORS = {
    "AcceleratorError": "CUDA error: an illegal memory access was encountered",
    "OutOfMemoryError": "CUDA out of memory. Tried to allocate 2.00 GiB",
    "DistBackendError": "NCCL error: unhandled system error",
}


def device_error(name):
    """The exception that torch raises, though there is no device."""
    import torch

    return (getattr(torch, name, None) or getattr(torch.distributed, name))(ERRORS[name])


class Breaking:
    """Brightness; call number `after` of a process raises, and those after it, or as many as `times` says."""

    def __init__(self, error, after, times):
        self.error, self.after, self.until, self.calls = error, after, after + times, 0

    def score(self, images, prompts):
        self.calls += 1
        if self.after <= self.calls < self.until:
            raise device_error(self.error)
        return images.mean((1, 2, 3)).astype(np.float32)


def build_breaking(error, after=3, times=1_000_000, at_start=None):
    """`at_start`: a file that is made by the first process, which fails while it builds the reward."""
    if at_start is not None and not os.path.exists(at_start):
        open(at_start, "w").close()
        raise device_error(error)
    return Breaking(error, after, times)


def break_device():
    """Have every linear layer after the first $BREAKS_AFTER fail, in the process that is the first to make $BREAKS."""
    import torch

    count = itertools.count(1)

    def hook(module, *_):
        if isinstance(module, torch.nn.Linear) and next(count) >= int(os.environ["BREAKS_AFTER"]):
            broken = Path(os.environ["BREAKS"])
            with suppress(FileExistsError), broken.open("x") as file:
                file.write(str(os.getpid()))
            if broken.read_text() == str(os.getpid()):
                raise device_error("AcceleratorError")

    torch.nn.modules.module.register_module_forward_hook(hook)


def broken():
    raise ValueError("taste: no such thing")


class Sleeper:
    def score(self, images, prompts):
        time.sleep(1000)


def build_sleeper():
    return Sleeper()


class Waiting(Faulty):
    """One that waits for somebody."""

    waits = (200.0, 1)


def build_waiting():
    return Waiting(errors=0, missing=None, returns=None)
