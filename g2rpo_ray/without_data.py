"""Runs code on PyTorch's meta device, where a tensor has a shape and a dtype and no data.

An operation fails there for a wrong shape, dtype or device, as it would on a GPU, and takes no memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.experimental._config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

META = "meta"
READS = {torch.ops.aten.item, torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "conv1d", "conv2d", "conv3d")
}
SMALL, LARGE = 64, 2**16  # elements of tensors whose data is kept: of floats, such as noise levels, and of integers


@contextmanager
def without_data() -> Iterator[None]:
    """Runs code that was written for a GPU on the meta device. Small tensors keep their data; of others a copy to the
    host is zeros, and a selection by a mask takes all."""
    selects_all = patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)
    with _KnownOrZero(), _ThroughHost(), selects_all:
        yield


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among an operation's arguments or results, which may be in lists."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [each for each in value if isinstance(each, torch.Tensor)]
    return found


class _KnownOrZero(TorchDispatchMode):
    """Keeps the data of small tensors on the CPU, for code that reads sizes, masks and positions; of all others a copy
    to the host is zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors, operation = tensors_in((*args, *kwargs.values())), func.overloadpacket
        if operation in READS:
            return self._on_host(args[0]).item() if args[0].is_meta else func(*args, **kwargs)
        if operation is torch.ops.aten.copy_ and args[1].is_meta and not args[0].is_meta:
            return args[0].copy_(self._on_host(args[1]))
        if tensors and tensors[0].is_meta and any(map(_is_cpu, (*args[1:], *kwargs.values()))):
            return func(self._on_host(tensors[0]), *args[1:], **kwargs)
        if operation in PRODUCTS and len({tensor.dtype for tensor in tensors}) > 1:  # meta does not check it
            raise RuntimeError(
                f"{func}: expected one dtype, found {', '.join(str(tensor.dtype) for tensor in tensors)}"
            )
        if operation in INDEXING:
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        try:
            result = func(*args, **kwargs)
        except RuntimeError:
            if any(not tensor.is_meta and tensor.ndim for tensor in tensors):  # devices are mixed
                raise
            # its size depends on data; all else fails again
            return tree_map(self._on_meta, self._computed(func, args, kwargs))
        made = [tensor for tensor in tensors_in([result]) if tensor.is_meta]
        if not made or not all(map(_is_small, made)) or any(t.is_meta and t not in self._known for t in tensors):
            return result
        data = self._computed(func, args, kwargs)
        found = tensors_in([data])
        if [tensor.shape for tensor in made] != [tensor.shape for tensor in found]:  # its size depends on data
            return tree_map(self._on_meta, data)
        self._known.update(zip(made, found, strict=True))
        return result

    def _places(self, index: Any) -> Sequence[Any]:
        """Numbers in place of a mask that is known."""
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool or index not in self._known:
            return [index]
        return [self._on_meta(numbers) for numbers in self._known[index].nonzero().unbind(1)]

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result on the CPU, with zeros for all that is not known."""
        here, named = tree_map(self._here, (args, kwargs))
        return func(*here, **named)

    def _here(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return self._known.get(leaf, torch.zeros((), dtype=leaf.dtype).expand(leaf.shape)) if leaf.is_meta else leaf
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        known: torch.Tensor | None = self._known.get(tensor)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu") if known is None else known

    def _on_meta(self, leaf: Any) -> Any:
        """A tensor in place of one on the CPU."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = torch.empty_like(leaf, device=META)
        if _is_small(leaf):
            self._known[made] = leaf
        return made


def _is_cpu(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == "cpu"


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (SMALL if tensor.is_floating_point() else LARGE)


class _ThroughHost(TorchFunctionMode):
    """What tensors are made from, and what is made from them, where PyTorch does not call the other mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == META:
            return func(*args, **{**kwargs, "device": "cpu"}).to(META)
        if func in (torch.Tensor.numpy, torch.Tensor.tolist) and args[0].is_meta:
            args = (args[0].cpu(), *args[1:])
        return func(*args, **kwargs)
