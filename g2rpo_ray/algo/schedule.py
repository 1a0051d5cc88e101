"""The sigma grid, and the index paths along which a branch is completed at each granularity."""

import math

import torch
from torch import Tensor


def shifted_sigmas(steps: int, shift: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise levels σ_0 = 1 … σ_T = 0, shape [steps + 1], on the CPU.

    σ_i = s·t / (1 + (s − 1)·t) with t = 1 − i/T (Flow-GRPO, DanceGRPO and G²RPO use s = 3 at 720 px).
    """
    t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return (shift * t / (1 + (shift - 1) * t)).to(dtype)


def resolution_shift(image_tokens: int) -> float:
    """FLUX's resolution-dependent shift, as the `shift` of `shifted_sigmas`.

    e^μ / (e^μ + 1/t − 1) is the grid above with s = e^μ, where μ is linear in the number of image tokens.
    """
    return math.exp(0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256))


def completion_path(branch_step: int, steps: int, stride: int, layout: str) -> list[int]:
    """Schedule indices from branch_step + 1 to `steps` that a branch visits at granularity `stride`.

    `paper`: the remaining-step counts 1, 1 + λ, 1 + 2λ … below the start, walked downwards, then the image.
    `authors` (their released code): one fine step, then every λ-th index; the last listed index is never evaluated
    unless it is the image: the step before it jumps there.
    """
    start = branch_step + 1
    if layout == "paper":
        remaining = range(1, steps - start, stride)
        return [start, *(steps - count for count in reversed(remaining)), *([steps] if start < steps else [])]
    if layout == "authors":
        listed = [start, *range(start + 1, steps + 1, stride)]
        return listed if listed[-1] == steps else [*(listed[:-1] if len(listed) > 1 else listed), steps]
    raise ValueError(f"layout: {layout!r} given; allowed are 'paper' and 'authors'")
