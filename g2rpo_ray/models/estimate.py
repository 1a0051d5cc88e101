"""What rollout needs of its device, by the configuration files of the model alone: reads no weights, uses no device."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from g2rpo_ray.config import Config
from g2rpo_ray.models.base import FlowModel
from g2rpo_ray.models.inference import fold_lora
from g2rpo_ray.models.lora import add_lora

LIBRARIES = 2**30  # bytes that a GPU's context and the workspaces of its libraries take, about


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
            "velocity": peak_bytes(one_velocity(model, config.rollout.micro_batch)),
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


def with_micro_batch(config: Config, n: int) -> Config:
    """The configuration with another `rollout.micro_batch`."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"micro_batch": n})})


def one_velocity(model: FlowModel, n: int) -> Callable[[], torch.Tensor]:
    """An evaluation of n latents of one prompt, the longest, on the default device."""
    x, sigma = torch.empty(n, *model.latent_shape), torch.empty(n)
    conditioning = model.condition([model.random_embedding("", torch.Generator())])
    return lambda: model.velocity(x, sigma, conditioning)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes alive at once of what `run` allocates."""
    with _Allocations() as allocations:
        run()
    return allocations.peak


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
