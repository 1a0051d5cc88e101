"""Counts the bytes of tensors: those that exist, and the peak of those that a computation makes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

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
