"""The noise levels of a run."""

from typing import Protocol

from torch import Tensor

from g2rpo_ray.algo.schedule import resolution_shift, shifted_sigmas
from g2rpo_ray.config import SamplerConfig


class Schedule(Protocol):
    """The properties of a model that decide the noise levels."""

    @property
    def image_tokens(self) -> int: ...
    def sigmas(self, steps: int) -> Tensor: ...


def sigma_grid(config: SamplerConfig, model: Schedule) -> Tensor:
    """The float32 noise levels [T + 1]."""
    if config.shift == "pipeline":
        return model.sigmas(config.steps)
    shift = resolution_shift(model.image_tokens) if config.shift == "dynamic" else float(config.shift)
    return shifted_sigmas(config.steps, shift)
