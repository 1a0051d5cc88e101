"""What rollout and learner need of their devices, by the model's configuration files alone: no weights, no device."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from g2rpo_ray.config import Config
from g2rpo_ray.models.base import FlowModel
from g2rpo_ray.models.inference import fold_lora
from g2rpo_ray.models.lora import add_lora

LIBRARIES = 2**30  # bytes that a GPU's context and the workspaces of its libraries take, about


DEVICES = (24, 48, 80)  # GB
GATHERED = 2 * 10**9  # bytes of weights that a rank under ZeRO 3 has gathered at once, about: DeepSpeed's default
ADAM = 16  # bytes of a parameter that is trained: itself, its gradient, two moments, all float32


def learner_memory(config: Config, states: int, checkpointed: bool) -> dict[str, int]:
    """Bytes on a rank's device: `weights` (frozen), `adapter` (with its optimizer), and the peak of the tensors of a
    forward and backward pass of so many states."""
    model = FlowModel.skeleton(config.model)
    weights = _bytes(model.transformer)
    add_lora(model.transformer, config.lora, seed=0)
    if checkpointed:
        model.enable_gradient_checkpointing()
    trained = sum(p.numel() for p in model.transformer.parameters() if p.requires_grad)
    with torch.device("meta"):
        velocity = one_velocity(model, states, config.velocity_cost > 1)
        passes = peak_bytes(lambda: velocity().square().sum().backward())
    return {"weights": weights, "adapter": ADAM * trained, "states": passes}


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
            "weights": _bytes(model.transformer) + _bytes(model.decoder),
            "velocity": peak_bytes(one_velocity(model, config.rollout.micro_batch, config.velocity_cost > 1)),
            "decode": peak_bytes(lambda: model.decode(latents)),
        }


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
        for stage, checkpointed in ((2, False), (2, True), (3, True)):
            share = weights / config.learner.ranks + GATHERED if stage == 3 else weights
            states = max(0, int((memory - adapter - share) // passes[checkpointed]["states"]))
            if states:
                break
        found.append(Fit(gigabytes, latents, states, checkpointed, stage))
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


def operations(model: FlowModel, n: int) -> float:
    """Floating-point operations of one evaluation of n latents, as PyTorch counts them, without a device."""
    with torch.device("meta"), torch.inference_mode():
        velocity = one_velocity(model, n)
        with FlopCounterMode(display=False) as counter:
            velocity()
    return float(counter.get_total_flops())


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
