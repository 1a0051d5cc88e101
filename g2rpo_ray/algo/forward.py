"""Objectives of the forward process: an image's advantage weights the loss of the velocity at the noised image.

    x_t = (1 − t) x0 + t ε,  v at (x_t, t)

nft   pulls v toward x0's velocity for a good image, and its mirror image in v_old for a bad one           DiffusionNFT
awm   the clipped surrogate on the log-probability −mean (v − (ε − x0))², weighted by t                    AWM

Both are as in the released code (NVlabs/DiffusionNFT, scxue/advantage_weighted_matching). Means are over all dimensions
but the first, N draws. Only v has a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")
AWM = {"awm": "uniform", **{f"awm_{weighting}": weighting for weighting in WEIGHTINGS[1:]}}
"""Weightings of AWM's objectives, by name: `awm_t` is AWM with the weighting t."""
MIN_DISTANCE, MIN_SQUARE = 1e-5, 1e-10
POWER = 0.25  # of `ghuber`


def noise_levels(times: str, place: Tensor, sigmas: Tensor, without: Sequence[int] = ()) -> Tensor:
    """Noise levels t [N] float32 at quantiles `place` [N] in [0, 1) of a distribution over the sampler's schedule.

    Args:
        times: `grid`, the noise levels at which steps start, equally likely (DiffusionNFT); `uniform`, anywhere on the
            schedule; `logit_normal`, mostly in its middle (AWM). The last two interpolate the schedule linearly, so
            they have its shift.
        place: quantiles; 0 is pure noise.
        sigmas: [T + 1].
        without: schedule indices that `grid` omits.

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
    """Quantiles [draws, images] in (0, 1): each image has one in each of `draws` equal parts.

    Within a part the images spread evenly, in an order drawn by the part's generator.
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
    """Losses [N] of DiffusionNFT (arXiv 2509.16117): r L⁺ + (1 − r) L⁻ with r = clamp(A / 2c + ½, 0, 1), times c/β.

    L± is the squared error of the image predicted by v± = v_old ± β (v − v_old), over its mean absolute error.

    Args:
        x0: latents [N, ...].
        x: x_t, see `renoised`.
        t: noise levels [N].
        v: velocity [N, ...], with gradient.
        v_old: velocity of the sampling policy.
        advantage: [N].
        beta: β, distance of v± from v_old.
        clip: c, maximum absolute advantage.
    """
    level, v_old = _column(t, x0), v_old.detach()
    share = (advantage / (2 * clip) + 0.5).clamp(0, 1)

    def error(velocity: Tensor) -> Tensor:
        wrong = x - level * velocity - x0
        return _mean(wrong**2) / _mean(wrong.detach().abs()).clamp(min=MIN_DISTANCE)

    good, bad = error(beta * v + (1 - beta) * v_old), error((1 + beta) * v_old - beta * v)
    return clip / beta * (share * good + (1 - share) * bad)


def awm_log_probs(weighting: str, x0: Tensor, noise: Tensor, t: Tensor, v: Tensor, *, power: float = POWER) -> Tensor:
    """AWM's log-probabilities [N] (arXiv 2509.25050) of images x0 by v at x_t; see WEIGHTINGS.

    Raises:
        ValueError: an unknown weighting.
    """
    square = velocity_shift(v, noise - x0)
    if weighting == "uniform":
        return -square
    if weighting in ("t", "t2"):
        return -square * t ** (2 if weighting == "t2" else 1)
    if weighting == "huber":
        return -((square + MIN_SQUARE).sqrt() - MIN_SQUARE**0.5) * t
    if weighting == "ghuber":
        return -((square + MIN_SQUARE) ** power - MIN_SQUARE**power) * t / power
    raise ValueError(f"weighting: {weighting!r} given; allowed are {', '.join(WEIGHTINGS)}")


def velocity_shift(v: Tensor, other: Tensor) -> Tensor:
    """Mean (v − v')² [N], a penalty like the KL, against the model without LoRA or an average of the policy."""
    return _mean((v - other) ** 2)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))
