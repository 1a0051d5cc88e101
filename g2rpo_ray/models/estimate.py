"""Estimates of a rollout actor's memory, and of operations, from the model's configuration files only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from g2rpo_ray.allocations import peak_bytes, tensor_bytes
from g2rpo_ray.config import Config
from g2rpo_ray.models.base import FlowModel
from g2rpo_ray.models.fold import fold_lora
from g2rpo_ray.models.lora import add_lora
from g2rpo_ray.models.quantized import quantized_bytes
from g2rpo_ray.without_data import META, without_data

LIBRARIES = 2**30  # approximate bytes of a GPU's context and of libraries' workspaces
BACKWARD_PASS = 1.2  # operations of a backward pass in forward passes: only activations and the LoRA have gradients.
# Counted for FLUX.1, FLUX.2 klein and Qwen-Image with a LoRA of rank 64 it is 1.12 to 1.18


def rollout_memory(config: Config, units: str = "all") -> dict[str, int]:
    """Bytes on a rollout actor's device: `weights`, and the peak of the tensors of a `velocity` and of a `decode`.

    A velocity of `rollout.micro_batch` latents and a VAE pass of `rollout.decode_batch` are run without data, and what
    is alive is added up: attention as a fused kernel, without `LIBRARIES`.

    `units`: as in `Sampler`; `all` leaves out completions that actors of their own compute.
    """
    with without_data(), torch.device(META), torch.inference_mode():
        model = FlowModel.skeleton(config.model)
        add_lora(model.transformer, config.lora, seed=0)
        fold_lora(model.transformer)
        latents = torch.empty(config.rollout.decode_batch, *model.latent_shape)
        completions, batch = config.rollout.completions, config.rollout.micro_batch
        weights = sum(map(tensor_bytes, filter(None, (model.low_noise, model.decoder))))
        if units != "completions" or not completions.need_weights:
            weights += tensor_bytes(model.transformer)
        if units == "completions":
            batch = config.rollout.completions_batch
        elif not completions.apart:
            batch = max(batch, config.rollout.completions_batch)
        if units == "completions" or not completions.apart:
            weights += _completing_bytes(config, model)
        return {
            "weights": weights,
            "velocity": peak_bytes(one_velocity(model, batch, config.velocity_cost > 1)),
            "decode": peak_bytes(lambda: model.decode(latents)),
        }


def _completing_bytes(config: Config, model: FlowModel) -> int:
    """Bytes of the weights of a separate transformer for completions, or 0."""
    completions = config.rollout.completions
    if not completions.need_weights:
        return 0
    return (
        tensor_bytes(model.transformer)
        if completions.quantization == "none"
        else quantized_bytes(model.transformer, completions.quantization)
    )


def fitting_micro_batch(config: Config, memory: int) -> int:
    """The largest micro-batch up to `rollout.micro_batch` that fits this memory in bytes; 0 if none does."""
    asked = config.rollout.micro_batch
    sizes = [rollout_memory(with_micro_batch(config, n)) for n in (1, asked)]
    needed, wanted = (sum(size.values()) + LIBRARIES for size in sizes)
    if memory < needed:
        return 0
    each = (wanted - needed) / max(1, asked - 1)  # all tensors of a velocity have a row for each latent, or one for all
    return asked if memory >= wanted else 1 + int((memory - needed) / each)


def with_micro_batch(config: Config, n: int) -> Config:
    """The configuration with another `rollout.micro_batch`."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"micro_batch": n})})


def one_velocity(model: FlowModel, n: int, guided: bool = False) -> Callable[[], torch.Tensor]:
    """Runs an evaluation of n latents of the longest prompt, on the default device."""
    x, sigma = torch.empty(n, *model.latent_shape), torch.ones(n)
    embedding = model.random_embedding("", torch.Generator())
    conditioning = model.condition([embedding], embedding if guided else None)
    return lambda: model.velocity(x, sigma, conditioning)


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations in units of 10^12, by PyTorch's count; guidance would double the evaluation."""

    evaluation: float  # of one velocity of a latent
    decoding: float  # of one image

    def state(self, checkpointed: bool) -> float:
        """Operations of a learner state, forward and backward through frozen weights, with recomputation."""
        return self.evaluation * (1 + checkpointed + BACKWARD_PASS)


def count_operations(config: Config) -> Operations:
    """The operations at the configuration's size, counted without weights or a device."""
    with without_data(), torch.device(META), torch.inference_mode():
        model = FlowModel.skeleton(config.model)
        latents = torch.empty(1, *model.latent_shape)
        return Operations(operations(one_velocity(model, 1)), operations(lambda: model.decode(latents)))


def operations(run: Callable[[], Any]) -> float:
    """Operations of `run` on the meta device, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12
