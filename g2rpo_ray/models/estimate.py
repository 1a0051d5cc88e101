"""Estimates of memory and operations of rollout and learner, from the model's configuration files only."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from g2rpo_ray.allocations import peak_bytes
from g2rpo_ray.config import Config
from g2rpo_ray.messages import one_line
from g2rpo_ray.models.base import FlowModel, describe_model
from g2rpo_ray.models.fold import fold_lora
from g2rpo_ray.models.lora import add_lora
from g2rpo_ray.models.quantized import quantized_bytes

TOKENS = 512  # of the longest prompt, where neither the settings nor a text encoder have a limit
LIBRARIES = 2**30  # approximate bytes of a GPU's context and of libraries' workspaces


DEVICES = (24, 48, 80)  # GB
GATHERED = 2 * 10**9  # approximate bytes of weights that a rank with ZeRO 3 gathers at once: DeepSpeed's default
TRAINED = 28  # bytes of a trained parameter, all float32: in the module, ZeRO's flat copy, gradient, its mean over the
# ranks, two moments, and AdamW's update
BACKWARD_PASS = 1.2  # operations of a backward pass in forward passes: only activations and the LoRA have gradients.
# Counted for FLUX.1, FLUX.2 klein and Qwen-Image with a LoRA of rank 64 it is 1.12 to 1.18
COPY = 4  # bytes of a parameter per other policy that the loss evaluates


def learner_memory(config: Config, states: int, checkpointed: bool) -> dict[str, int]:
    """Bytes on a rank's device: `weights` (frozen), `adapter` (with its optimizer), and the peak of the tensors of a
    forward and backward pass of so many states."""
    model = FlowModel.skeleton(config.model)
    weights = _bytes(model.transformer)
    add_lora(model.transformer, config.lora, seed=0)
    fold_lora(model.transformer)
    if checkpointed:
        model.enable_gradient_checkpointing()
    trained = sum(p.numel() for p in model.transformer.parameters() if p.requires_grad)
    with torch.device("meta"):
        velocity = one_velocity(model, states, config.velocity_cost > 1)
        passes = _peak(lambda: velocity().square().sum().backward())
    return {"weights": weights, "adapter": (TRAINED + COPY * _copies(config)) * trained, "states": passes}


def _copies(config: Config) -> int:
    """Copies of the LoRA on the learner's device: the sampling policy, if it differs, and an average."""
    learner, stale = config.learner, config.rollout.max_staleness > 0
    another = learner.forward or (stale and learner.evaluates_old)
    return int(another) + (learner.old_kl > 0)


def rollout_memory(config: Config, units: str = "all") -> dict[str, int]:
    """Bytes on a rollout actor's device: `weights`, and the peak of the tensors of a `velocity` and of a `decode`.

    A velocity of `rollout.micro_batch` latents and a VAE pass of `rollout.decode_batch` are run without data, and what
    is alive is added up: attention as a fused kernel, without `LIBRARIES`.

    `units`: as in `Sampler`; `all` leaves out completions that actors of their own compute.
    """
    with torch.device("meta"), torch.inference_mode():
        model = FlowModel.skeleton(config.model)
        add_lora(model.transformer, config.lora, seed=0)
        fold_lora(model.transformer)
        latents = torch.empty(config.rollout.decode_batch, *model.latent_shape)
        completions, batch = config.rollout.completions, config.rollout.micro_batch
        weights = sum(map(_bytes, filter(None, (model.low_noise, model.decoder))))
        if units != "completions" or not completions.need_weights:
            weights += _bytes(model.transformer)
        if units == "completions":
            batch = completions.micro_batch or batch
        elif not completions.apart:
            batch = max(batch, completions.micro_batch or batch)
        if units == "completions" or not completions.apart:
            weights += _completing_bytes(config, model)
        return {
            "weights": weights,
            "velocity": _peak(one_velocity(model, batch, config.velocity_cost > 1)),
            "decode": _peak(lambda: model.decode(latents)),
        }


def _completing_bytes(config: Config, model: FlowModel) -> int:
    """Bytes of the weights of a separate transformer for completions, or 0."""
    completions = config.rollout.completions
    if not completions.need_weights:
        return 0
    return (
        _bytes(model.transformer)
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


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest batches on a device of this many GB (10^9 bytes), by estimate; 0 if none fits."""

    gigabytes: int
    latents: int  # of a rollout actor's largest micro-batch
    states: int  # of a learner rank's
    checkpointed: bool  # True if the learner needs gradient checkpointing
    zero_stage: int  # the lowest one that fits, with the configuration's ranks


def fits(config: Config) -> list[Fit]:
    """Fits on devices of common sizes; a rank without gradient checkpointing, else with it, else also with ZeRO 3."""
    one, two = (sum(rollout_memory(with_micro_batch(config, n)).values()) for n in (1, 2))
    passes = {checkpointed: learner_memory(config, 1, checkpointed) for checkpointed in (False, True)}
    weights, adapter = passes[True]["weights"], passes[True]["adapter"]
    found = []
    for gigabytes in DEVICES:
        memory = gigabytes * 10**9 - LIBRARIES
        latents = max(0, 1 + (memory - one) // (two - one))
        for stage, checkpointed in ((1, False), (1, True), (3, True)):
            share = weights / config.learner.ranks + GATHERED if stage == 3 else weights
            states = max(0, int((memory - adapter - share) // passes[checkpointed]["states"]))
            if states:
                break
        found.append(Fit(gigabytes, latents, states, checkpointed, stage))
    return found


def full_size(config: Config) -> dict[str, dict[str, int]]:
    """Bytes on its device, by category, of each kind of actor with the configuration's own batches.

    What an actor evaluates is run at full size without data, so that shapes, dtypes and devices are checked. The
    encoder's are known where the configurations of the text encoders are on this machine.

    Raises:
        ValueError: one line; an evaluation, a decoding or a backward pass fails at this size.
    """
    learner = config.learner
    try:
        rank = learner_memory(config, learner.micro_batch, learner.gradient_checkpointing)
        found = {"rollout actor": rollout_memory(config), "learner rank": rank}
        if config.rollout.completions.apart:
            found["completions actor"] = rollout_memory(config, "completions")
    except (RuntimeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"model.path: {config.model.path} fails at full size: {one_line(error, 400)}") from None
    if learner.zero_stage == 3:
        rank["weights"] = rank["weights"] // learner.ranks + GATHERED
    if encoder := encoder_memory(config):
        found["encoder"] = encoder
    return found


def encoder_memory(config: Config) -> dict[str, int]:
    """Bytes on the encoder's device: `weights` of the text encoders, and the peak of the tensors of an `encoding` of
    the longest prompt by one of them. Empty if their configurations are not on this machine."""
    source, length = Path(config.model.location), config.model.max_sequence_length or TOKENS
    index = json.loads((source / "model_index.json").read_text())
    weights, peaks = 0, [0]
    for name in describe_model(config.model)[1].text_parts:
        if (source / name / "config.json").is_file() and name.startswith("text_encoder"):
            kind = getattr(transformers, index[name][1])
            settings = kind.config_class.from_pretrained(source / name)
            most = getattr(settings.get_text_config(), "max_position_embeddings", length)
            with torch.device("meta"), torch.inference_mode():
                encoder = kind(settings).to(getattr(torch, config.model.dtype))
                ids = torch.zeros(1, min(length, most), dtype=torch.long)
                peaks.append(_peak(partial(encoder, ids, output_hidden_states=True)))
            weights += _bytes(encoder)
    return {"weights": weights, "encoding": max(peaks)} if weights else {}


def with_micro_batch(config: Config, n: int) -> Config:
    """The configuration with another `rollout.micro_batch`."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"micro_batch": n})})


def one_velocity(model: FlowModel, n: int, guided: bool = False) -> Callable[[], torch.Tensor]:
    """Runs an evaluation of n latents of the longest prompt, on the default device."""
    x, sigma = torch.empty(n, *model.latent_shape), torch.empty(n)
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
    with torch.device("meta"), torch.inference_mode():
        model = FlowModel.skeleton(config.model)
        latents = torch.empty(1, *model.latent_shape)
        return Operations(operations(one_velocity(model, 1)), operations(lambda: model.decode(latents)))


def operations(run: Callable[[], Any]) -> float:
    """Operations of `run` on the meta device, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def _peak(run: Callable[[], Any]) -> int:
    """Peak of the bytes that `run` allocates on a GPU, where attention is fused."""
    with patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention):
        return peak_bytes(run)


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Attention with the memory of a GPU's fused kernel, which keeps no scores; on meta torch would use another."""
    result: torch.Tensor = _Attention.apply(query, key, value)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
