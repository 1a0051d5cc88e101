"""Counts the bytes of tensors: those that exist, and the peak of those that a computation makes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def held_bytes() -> int:
    """Bytes of all tensors that this process holds; tensors that share memory count once."""
    gc.collect()
    held = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in held)}
    return sum(storages.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak of the bytes that `run` allocates."""
    with patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention), _Allocations() as allocations:
        run()
    return allocations.peak


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
