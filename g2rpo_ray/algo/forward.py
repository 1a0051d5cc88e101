"""Objectives of the forward process: what an image's advantage says of the velocity at the image made noisy again.

    x_t = (1 − t) x0 + t ε,  v at (x_t, t)

nft   pulls v toward x0's velocity where the image is good, and its mirror image in v_old where it is bad  DiffusionNFT
awm   the clipped surrogate on the log-probability −mean (v − (ε − x0))², weighted by t                    AWM

Both as in the released code (NVlabs/DiffusionNFT, scxue/advantage_weighted_matching). Means are over all dimensions but
the first, N draws; nothing here has a gradient but v.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")
AWM = {"awm": "uniform", **{f"awm_{weighting}": weighting for weighting in WEIGHTINGS[1:]}}
"""The objectives here, by name; `awm_t` is AWM with the weighting t."""
SMALLEST_DISTANCE, SMALLEST_SQUARE = 1e-5, 1e-10
POWER = 0.25  # of `ghuber`


def noise_levels(times: str, place: Tensor, sigmas: Tensor, without: Sequence[int] = ()) -> Tensor:
    """t [N] float32 at places [N] in [0, 1) of a distribution over the sampler's schedule, 0 being pure noise.

    Args:
        times: `grid`, the noise levels at which its steps start, all equally likely (DiffusionNFT); `uniform`, anywhere
            on it; `logit_normal`, the same with more in the middle (AWM). Between steps the schedule is a straight
            line, so that both have its shift.
        sigmas: [T + 1].
        without: schedule indices that `grid` leaves out.

    Raises:
        ValueError: an unknown distribution.
    """
    sigmas, place = sigmas.double(), place.double()
    if times == "grid":
        steps = torch.tensor([index for index in range(len(sigmas) - 1) if index not in without])
        return sigmas[steps[(place * len(steps)).long()]].float()
    if times == "logit_normal":
        place = torch.special.ndtri(place).sigmoid()
    elif times != "uniform":
        raise ValueError(f"times: {times!r} given; allowed are 'grid', 'uniform' and 'logit_normal'")
    at = place * (len(sigmas) - 1)
    index = at.long().clamp(max=len(sigmas) - 2)
    return torch.lerp(sigmas[index], sigmas[index + 1], at - index).float()


def stratified(images: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Places [draws, images] in (0, 1), a generator a draw: each image has one in each of as many equal parts.

    Within a part the images spread evenly, in an order that its generator draws.
    """
    rows, draws = [], len(generators)
    for draw, generator in enumerate(generators):
        order = torch.randperm(images, generator=generator)
        jitter = torch.rand(images, generator=generator, dtype=torch.float64)
        rows.append((draw + (order + jitter) / images) / draws)
    return torch.stack(rows)


def renoised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [N, ...] of images' latents and standard normal noise [N, ...] at noise levels [N]."""
    level = _column(t, x0)
    return (1 - level) * x0 + level * noise


def nft_losses(
    x0: Tensor, x: Tensor, t: Tensor, v: Tensor, v_old: Tensor, advantage: Tensor, *, beta: float, clip: float
) -> Tensor:
    """[N]: DiffusionNFT (arXiv 2509.16117), r L⁺ + (1 − r) L⁻ with r = clamp(A / 2c + ½, 0, 1), times c/β.

    L± is the squared error of the image that v± = v_old ± β (v − v_old) predicts, over its mean absolute error.

    Args:
        x: x_t, `renoised`.
        v_old: of the policy that sampled.
        beta: β, how far v± are from v_old.
        clip: c, the largest absolute advantage.
    """
    level, v_old = _column(t, x0), v_old.detach()
    share = (advantage / (2 * clip) + 0.5).clamp(0, 1)

    def error(velocity: Tensor) -> Tensor:
        wrong = x - level * velocity - x0
        return _mean(wrong**2) / _mean(wrong.detach().abs()).clamp(min=SMALLEST_DISTANCE)

    good, bad = error(beta * v + (1 - beta) * v_old), error((1 + beta) * v_old - beta * v)
    return clip / beta * (share * good + (1 - share) * bad)


def awm_log_probs(weighting: str, x0: Tensor, noise: Tensor, t: Tensor, v: Tensor, *, power: float = POWER) -> Tensor:
    """[N]: AWM's log-probability (arXiv 2509.25050) of images x0, by v at x_t; see WEIGHTINGS.

    Raises:
        ValueError: an unknown weighting.
    """
    square = velocity_shift(v, noise - x0)
    if weighting == "uniform":
        return -square
    if weighting in ("t", "t2"):
        return -square * t ** (2 if weighting == "t2" else 1)
    if weighting == "huber":
        return -((square + SMALLEST_SQUARE).sqrt() - SMALLEST_SQUARE**0.5) * t
    if weighting == "ghuber":
        return -((square + SMALLEST_SQUARE) ** power - SMALLEST_SQUARE**power) * t / power
    raise ValueError(f"weighting: {weighting!r} given; allowed are {', '.join(WEIGHTINGS)}")


def velocity_shift(v: Tensor, other: Tensor) -> Tensor:
    """Mean (v − v')² [N]: against the model without LoRA, or an average of the policy, a penalty like the KL's."""
    return _mean((v - other) ** 2)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))
