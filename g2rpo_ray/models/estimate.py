"""What rollout and learner need of their devices, by the model's configuration files alone: no weights, no device."""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from g2rpo_ray.config import Config
from g2rpo_ray.messages import one_line
from g2rpo_ray.models.base import FlowModel, describe_model
from g2rpo_ray.models.fold import fold_lora
from g2rpo_ray.models.lora import add_lora
from g2rpo_ray.models.quantized import quantized_bytes

LIBRARIES = 2**30  # bytes that a GPU's context and the workspaces of its libraries take, about


DEVICES = (24, 48, 80)  # GB
GATHERED = 2 * 10**9  # bytes of weights that a rank under ZeRO 3 has gathered at once, about: DeepSpeed's default
TRAINED = 28  # bytes of a parameter that is trained, all float32: in the module, ZeRO's flat copy, gradient, its mean
# over the ranks, two moments, and the update that AdamW makes of them
BACKWARD_PASS = 1.2  # forward passes, in operations: only activations and the LoRA have gradients. Counted for FLUX.1,
# FLUX.2 klein and Qwen-Image with a LoRA of rank 64 it is 1.12 to 1.18
COPY = 4  # bytes of a parameter for each other policy that the loss evaluates


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
        passes = peak_bytes(lambda: velocity().square().sum().backward())
    return {"weights": weights, "adapter": (TRAINED + COPY * _copies(config)) * trained, "states": passes}


def _copies(config: Config) -> int:
    """Copies of the LoRA on the learner's device: the policy that sampled, if it is another one, and an average."""
    learner, stale = config.learner, config.rollout.max_staleness > 0
    another = learner.forward or (stale and learner.evaluates_old)
    return int(another) + (learner.old_kl > 0)


def rollout_memory(config: Config) -> dict[str, int]:
    """Bytes on a rollout actor's device: `weights`, and the peak of the tensors of a `velocity` and of a `decode`.

    A velocity of `rollout.micro_batch` latents and a VAE pass of `rollout.decode_batch` are run without data, and what
    is alive is added up: attention as a fused kernel, without `LIBRARIES`.
    """
    with torch.device("meta"), torch.inference_mode():
        model = FlowModel.skeleton(config.model)
        add_lora(model.transformer, config.lora, seed=0)
        fold_lora(model.transformer)
        latents = torch.empty(config.rollout.decode_batch, *model.latent_shape)
        return {
            "weights": _bytes(model.transformer) + _bytes(model.decoder) + _completing_bytes(config, model),
            "velocity": peak_bytes(one_velocity(model, config.rollout.micro_batch, config.velocity_cost > 1)),
            "decode": peak_bytes(lambda: model.decode(latents)),
        }


def _completing_bytes(config: Config, model: FlowModel) -> int:
    """Of the transformer that completes branches, where it is another one."""
    completions = config.rollout.completions
    if not completions.differ:
        return 0
    return _bytes(model.transformer) if completions.quantization == "none" else quantized_bytes(model.transformer)


def fitting_micro_batch(config: Config, memory: int) -> int:
    """The largest micro-batch up to `rollout.micro_batch` that this memory, in bytes, holds; 0 if none does."""
    asked = config.rollout.micro_batch
    sizes = [rollout_memory(with_micro_batch(config, n)) for n in (1, asked)]
    needed, wanted = (sum(size.values()) + LIBRARIES for size in sizes)
    if memory < needed:
        return 0
    each = (wanted - needed) / max(1, asked - 1)  # all tensors of a velocity have a row for each latent, or one for all
    return asked if memory >= wanted else 1 + int((memory - needed) / each)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a device of so many GB (10^9 bytes) holds, by estimate; 0: not even one."""

    gigabytes: int
    latents: int  # of a rollout actor's largest micro-batch
    states: int  # of a learner rank's
    checkpointed: bool  # whether the learner needs gradient checkpointing for them
    zero_stage: int  # the least that is needed, with the configuration's ranks


def fits(config: Config) -> list[Fit]:
    """For devices of the usual sizes; a rank without gradient checkpointing, else with it, else under ZeRO 3, too."""
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

    What an actor evaluates is run at full size without data, so that shapes, dtypes and devices are checked. Of the
    encoder it is the weights alone, where the configurations of the text encoders are on this machine.

    Raises:
        ValueError: one line; an evaluation, a decoding or a backward pass fails at this size.
    """
    learner = config.learner
    try:
        rank = learner_memory(config, learner.micro_batch, learner.gradient_checkpointing)
        found = {"rollout actor": rollout_memory(config), "learner rank": rank}
    except (RuntimeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"model.path: {config.model.path} fails at full size: {one_line(error, 400)}") from None
    if learner.zero_stage == 3:
        rank["weights"] = rank["weights"] // learner.ranks + GATHERED
    if encoders := text_encoders_bytes(config):
        found["encoder"] = {"weights": encoders}
    return found


def text_encoders_bytes(config: Config) -> int:
    """Of the text encoders' weights; 0 where their configurations are not on this machine."""
    source = Path(config.model.location)
    index = json.loads((source / "model_index.json").read_text())
    found = 0
    for name in describe_model(config.model)[1].text_parts:
        if (source / name / "config.json").is_file() and name.startswith("text_encoder"):
            kind = getattr(transformers, index[name][1])
            with torch.device("meta"):
                encoder = kind(kind.config_class.from_pretrained(source / name))
            found += _bytes(encoder.to(getattr(torch, config.model.dtype)))
    return found


def with_micro_batch(config: Config, n: int) -> Config:
    """The configuration with another `rollout.micro_batch`."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"micro_batch": n})})


def one_velocity(model: FlowModel, n: int, guided: bool = False) -> Callable[[], torch.Tensor]:
    """An evaluation of n latents of one prompt, the longest, on the default device."""
    x, sigma = torch.empty(n, *model.latent_shape), torch.empty(n)
    embedding = model.random_embedding("", torch.Generator())
    conditioning = model.condition([embedding], embedding if guided else None)
    return lambda: model.velocity(x, sigma, conditioning)


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations, 10^12, as PyTorch counts them; without guidance, which takes two evaluations."""

    evaluation: float  # of one velocity of a latent
    decoding: float  # of one image

    def state(self, checkpointed: bool) -> float:
        """Of a state of the learner, forward and backward through frozen weights, with what is computed again."""
        return self.evaluation * (1 + checkpointed + BACKWARD_PASS)


def count_operations(config: Config) -> Operations:
    """Counted at the configuration's size, without weights or a device."""
    with torch.device("meta"), torch.inference_mode():
        model = FlowModel.skeleton(config.model)
        latents = torch.empty(1, *model.latent_shape)
        return Operations(operations(one_velocity(model, 1)), operations(lambda: model.decode(latents)))


def operations(run: Callable[[], Any]) -> float:
    """What `run` computes on the meta device, 10^12 floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes alive at once of what `run` allocates."""
    with patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention), _Allocations() as allocations:
        run()
    return allocations.peak


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """Attention as a GPU's fused kernel has it, which keeps no scores: without a device torch would pick another."""
    result: torch.Tensor = _Attention.apply(query, key, value)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor))
        self._known.update(tensor.untyped_storage() for tensor in given)  # weights: not allocated here
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
