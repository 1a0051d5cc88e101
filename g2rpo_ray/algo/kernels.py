"""Steps of the sampler, deterministic and stochastic. The same function samples and rescores a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rpo_ray.imports import named

Step = tuple[Tensor, float]
"""Mean and std of a step."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A step from one schedule index to a later one."""

    next_x: Tensor  # [N, ...]
    mean: Tensor  # [N, ...]
    std: float  # of every element
    log_prob: Tensor | None  # [N], nats, mean over the non-batch dimensions; None if the step has no noise


def ode_step(x: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """Euler step x + (σ' − σ) v of the probability-flow ODE; sigmas are numbers or one per row [N]."""
    if isinstance(sigma, Tensor) and sigma.ndim:
        delta = (torch.as_tensor(next_sigma, device=sigma.device) - sigma).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return x + delta * velocity
    return x + (float(next_sigma) - float(sigma)) * velocity


def transition(
    kernel: str,
    x: Tensor,
    velocity: Tensor,
    sigmas: Tensor,
    index: int,
    eta: float,
    *,
    next_index: int | None = None,
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> Transition:
    """Samples (with `noise`) or rescores (with `next_x`) the step from `index` to `next_index`.

    Args:
        kernel: `ode`; `flow` (Flow-GRPO, g = η√(σ/(1−σ)), at σ = 1 with σ_1 below the root); `dance` (DanceGRPO,
            g = η); `cps` (Flow-CPS); or your own as `package.module:name`: see KERNELS. With η = 0 each of these is
            the ODE step.
        x, velocity: [N, ...], float32 or float64; a dimension of 1 broadcasts against `noise` or `next_x`.
        sigmas: the grid, [T + 1].
        index: of the start.
        eta: noise level η.
        next_index: default `index + 1`; a later one makes one long step (E-GRPO).
        noise: standard normal ε, [N, ...].
        next_x: the state after the step, [N, ...].

    Raises:
        ValueError: an unknown kernel, or a stochastic step with neither or both of noise and next_x.
    """
    sigma, next_sigma = float(sigmas[index]), float(sigmas[index + 1 if next_index is None else next_index])
    return step_between(kernel, x, velocity, sigma, next_sigma, eta, first=float(sigmas[1]), noise=noise, next_x=next_x)


def step_between(
    kernel: str,
    x: Tensor,
    velocity: Tensor,
    sigma: float,
    next_sigma: float,
    eta: float,
    *,
    first: float,
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> Transition:
    """`transition` between two noise levels that need not be on the grid; `first` is the grid's σ_1."""
    mean, std = named("kernel", kernel, KERNELS)(x, velocity, sigma, next_sigma, eta, first)
    if std == 0.0:
        return Transition(next_x=mean, mean=mean, std=0.0, log_prob=None)
    if noise is not None and next_x is None:
        reached = mean + std * noise
    elif next_x is not None and noise is None:
        reached = next_x
    else:
        raise ValueError(f"transition: kernel {kernel!r} at eta={eta} needs either noise or next_x")
    square = (reached - mean) ** 2
    log_density = -square if kernel == "cps" else -square / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return Transition(reached, mean, std, log_density.flatten(1).mean(1))


def time_weight(sigma: float, next_sigma: float, first: float) -> float:
    """√(σ / ((1 − σ) |Δσ|)), by which edges of the `flow` kernel have gradients of equal size.

    The mean moves with the velocity by |Δσ| (1 + η² / 2), at pure noise by |Δσ|. The std is η √(σ |Δσ| / (1 − σ)).
    Their ratio is the size of the log-probability's gradient. It falls with √(|Δσ| (1 − σ) / σ), which a large shift
    brings near 0 at early steps (LongCat-Video).

    Args:
        first: the grid's σ_1, in place of σ = 1 in 1 − σ, as in the kernel.
    """
    return math.sqrt(sigma / ((1 - (first if sigma == 1.0 else sigma)) * abs(next_sigma - sigma)))


def ends_without_noise(kernel: str, eta: float) -> bool:
    """True if a stochastic step that ends at the image has no noise."""
    zero = torch.zeros(1, 1)
    return named("kernel", kernel, KERNELS)(zero, zero, 0.5, 0.0, eta, 0.9)[1] == 0.0


def _ode(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, eta: float, first: float) -> Step:
    return _gaussian(x, velocity, sigma, next_sigma, 0.0)


def _flow(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, eta: float, first: float) -> Step:
    g = eta * math.sqrt(sigma / (1 - (first if sigma == 1.0 else sigma)))  # 1 − σ is 0 at pure noise
    return _gaussian(x, velocity, sigma, next_sigma, g)


def _dance(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, eta: float, first: float) -> Step:
    return _gaussian(x, velocity, sigma, next_sigma, eta)


def _cps(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, eta: float, first: float) -> Step:
    std = next_sigma * math.sin(eta * math.pi / 2)
    image_estimate, noise_estimate = x - sigma * velocity, x + (1 - sigma) * velocity
    return (1 - next_sigma) * image_estimate + math.sqrt(next_sigma**2 - std**2) * noise_estimate, std


def _gaussian(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, g: float) -> Step:
    delta = next_sigma - sigma
    noise_estimate = x + (1 - sigma) * velocity
    mean = x + delta * velocity + (g**2 / (2 * sigma)) * delta * noise_estimate
    return mean, g * math.sqrt(-delta)


KERNELS: dict[str, Callable[[Tensor, Tensor, float, float, float, float], Step]] = {
    "flow": _flow,
    "dance": _dance,
    "cps": _cps,
    "ode": _ode,
}
"""(x [N, ...], velocity [N, ...], σ, σ', η, σ_1) ─► mean [N, ...] and std of the step's Gaussian; std 0: no noise."""
