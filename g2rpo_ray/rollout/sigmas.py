"""The noise levels of a run."""

from typing import Protocol

from torch import Tensor

from g2rpo_ray.algo.schedule import resolution_shift, shifted_sigmas
from g2rpo_ray.config import Config, SamplerConfig


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


def check_trained(config: Config, sigmas: Tensor, lora_from: float) -> None:
    """Raises ValueError, in one line, if a trained state has a noise level at which the LoRA is not evaluated.

    Args:
        sigmas: float32 [T + 1].
        lora_from: see `FlowModel`.
    """
    if not lora_from:
        return
    first = int((1000 * sigmas >= 1000 * lora_from).sum())  # the first index below, as the pipeline compares
    have = f"the second network of this pipeline, which has no LoRA, evaluates from schedule index {first}"
    if config.learner.forward or config.learner.subpaths:
        key = f"objective={config.learner.objective}" if config.learner.forward else "subpaths"
        raise ValueError(f"learner.{key} given, but {have}; use a method that trains stochastic edges")
    if late := [step for step in config.sampler.probed_steps if step >= first]:
        raise ValueError(
            f"sampler.branch_steps: edges that start at {late} would be trained, but {have}; give earlier branch "
            "steps, a larger sampler.shift, or add these to sampler.untrained"
        )
