"""What the settings of the sampler stand for in the algorithm's terms: shared by sampling, learning and the driver."""

from torch import Tensor

from g2rpo_ray.algo import BranchPlan, resolution_shift, shifted_sigmas
from g2rpo_ray.config import SamplerConfig


def branch_plan(config: SamplerConfig) -> BranchPlan:
    return BranchPlan(config.steps, config.branch_steps, config.strides, config.layout, config.group_size)


def sigma_grid(config: SamplerConfig, image_tokens: int) -> Tensor:
    """The float32 noise levels [T + 1]; `image_tokens` decides FLUX's dynamic shift."""
    shift = resolution_shift(image_tokens) if config.shift == "dynamic" else float(config.shift)
    return shifted_sigmas(config.steps, shift)
