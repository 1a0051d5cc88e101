"""The sigma grid."""

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
