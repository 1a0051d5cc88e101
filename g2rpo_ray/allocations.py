"""Counts the bytes of tensors: those that exist, and the peak of those that a computation makes, also without data."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.experimental._config
from torch.utils._python_dispatch import TorchDispatchMode

from g2rpo_ray.without_data import META, tensors_in


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def held_bytes() -> int:
    """Bytes of all tensors on the meta device that this process holds; tensors that share memory count once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    held = [tensor for tensor in tensors if tensor.is_meta]
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in held)}
    return sum(storages.values())


def peak_bytes(run: Callable[[], Any], device: str = META) -> int:
    """Peak of the bytes that `run` allocates on a device."""
    with Allocations("all", device) as allocations:
        run()
    return allocations.peaks["all"]


class Allocations(TorchDispatchMode):
    """While it is active, counts the bytes that are allocated on a device, by category.

    On the meta device attention is one fused kernel, which keeps no scores, as on a GPU.
    """

    def __init__(self, category: str, device: str = META) -> None:
        """`category`: of all that has no category of its own."""
        super().__init__()
        self.peaks = {category: 0}
        """Largest bytes at any time, by category."""
        self._live = {category: 0}
        self._category, self._device = category, device
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        fused = patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention)
        self._attention = fused if device == META else nullcontext()

    def __enter__(self) -> "Allocations":
        self._attention.__enter__()
        entered: Allocations = super().__enter__()
        return entered

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._attention.__exit__(*raised)

    def apart(self, category: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The function `run`, with a category of its own for what it allocates."""
        self.peaks[category] = self._live[category] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self._category = self._category, category
            try:
                return run(*args, **kwargs)
            finally:
                self._category = before

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((*args, *kwargs.values())):
            self._known.add(tensor.untyped_storage())  # weights: not allocated here
        result = func(*args, **kwargs)
        for tensor in tensors_in([result]):
            if tensor.device.type == self._device:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        category, size = self._category, storage.nbytes()
        self._live[category] += size
        self.peaks[category] = max(self.peaks[category], self._live[category])
        weakref.finalize(storage, self._free, category, size)

    def _free(self, category: str, size: int) -> None:
        self._live[category] -= size


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Attention with the memory of a GPU's fused kernel; on meta torch would use another."""
    result: torch.Tensor = _Attention.apply(query, key, value)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result = query.new_zeros(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])
