"""One step of the sampler: the deterministic one and the stochastic ones, sampled and rescored by the same function."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Transition:
    """A step from schedule index i to i + 1."""

    next_x: Tensor  # [N, ...]
    mean: Tensor  # [N, ...]
    std: float  # of every element
    log_prob: Tensor | None  # [N], nats, mean over the non-batch dimensions; None where the step has no noise


def ode_step(x: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """Euler step x + (σ' − σ) v of the probability-flow ODE; sigmas may be one number or one a row [N]."""
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
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> Transition:
    """Take (given `noise`) or rescore (given `next_x`) the step from `index` to `index + 1`.

    Args:
        kernel: `ode`; `flow` (Flow-GRPO, g = η√(σ/(1−σ)), at σ = 1 with the next sigma below the root); `dance`
            (DanceGRPO, g = η); `cps` (Flow-CPS). With η = 0 each of them is the ODE step.
        x, velocity: [N, ...], float32 or float64; a dimension of 1 broadcasts against `noise` or `next_x`.
        sigmas: the grid, [T + 1].
        noise: standard normal ε, [N, ...].
        next_x: the state that was reached, [N, ...].

    Raises:
        ValueError: an unknown kernel, or a stochastic step that is given neither or both of noise and next_x.
    """
    sigma, next_sigma = float(sigmas[index]), float(sigmas[index + 1])
    if kernel not in ("ode", "flow", "dance", "cps"):
        raise ValueError(f"kernel: {kernel!r} given; allowed are 'ode', 'flow', 'dance' and 'cps'")
    if kernel == "cps":
        mean, std = _cps(x, velocity, sigma, next_sigma, eta)
    else:
        mean, std = _gaussian(x, velocity, sigma, next_sigma, _diffusion(kernel, eta, sigmas, index))
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


def _diffusion(kernel: str, eta: float, sigmas: Tensor, index: int) -> float:
    if kernel == "ode":
        return 0.0
    if kernel == "dance":
        return eta
    sigma = float(sigmas[index])
    below_one = float(sigmas[1]) if sigma == 1.0 else sigma  # 1 − σ is 0 at pure noise
    return eta * math.sqrt(sigma / (1 - below_one))


def _gaussian(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, g: float) -> tuple[Tensor, float]:
    delta = next_sigma - sigma
    noise_estimate = x + (1 - sigma) * velocity
    mean = x + delta * velocity + (g**2 / (2 * sigma)) * delta * noise_estimate
    return mean, g * math.sqrt(-delta)


def _cps(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, eta: float) -> tuple[Tensor, float]:
    std = next_sigma * math.sin(eta * math.pi / 2)
    image_estimate, noise_estimate = x - sigma * velocity, x + (1 - sigma) * velocity
    return (1 - next_sigma) * image_estimate + math.sqrt(next_sigma**2 - std**2) * noise_estimate, std
