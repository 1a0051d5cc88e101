"""A CUDA device without a GPU: tensors that claim `cuda:0`, compute on the CPU and refuse to mix devices.

    with EmulatedGpu() as gpu:
        sampler = Sampler(config)  # whose device is "cuda"
        ...
    gpu.to_host  # copies by the function of this project that causes them

The product's own code runs, with real numbers: those of the CPU, to the bit. An operation on tensors of both devices
raises, as on a GPU. Forward passes only: autograd's engine needs a real device for the backward pass.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
PROJECT = str(Path(__file__).parents[2])
COPIES = {f"aten.{name}" for name in ("_to_copy.default", "copy_.default", "_copy_from.default", "to.other",
                                      "to.device", "to.dtype_layout", "type_as.default")}  # fmt: skip
WAITS = {f"aten.{name}.default" for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal",
                                             "masked_select")}  # fmt: skip
"""Operations whose result the host needs, or whose result's shape depends on the data; composite ones, too: inference
mode does not take them apart."""

scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention


@contextmanager
def _without_dispatch():
    guard = torch._C._DisableTorchDispatch()
    try:
        yield
    finally:
        del guard


class GpuTensor(Tensor):
    """A tensor of the emulated device; `inner`, on the CPU, has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        with torch.inference_mode(inner.is_inference()):  # as a view of a weight is none in inference mode
            with _without_dispatch():
                shape = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
            made = Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=CUDA)
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def data(self) -> "GpuTensor":
        return GpuTensor(self.inner.detach())

    @data.setter
    def data(self, value: "GpuTensor") -> None:
        torch._C.TensorBase.data.__set__(self, value)
        self.inner = value.inner

    def record_stream(self, stream: Any) -> None:
        pass

    def tolist(self) -> Any:
        _active().waited()
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active().dispatch(func, args, kwargs or {})


class _Stream:
    """Everything is done when it is asked for, so that there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None:
        _active().waited()

    def wait_stream(self, other: Any) -> None: ...


def _active() -> "EmulatedGpu":
    assert EmulatedGpu.active, "a tensor of the emulated device is used after EmulatedGpu has ended"
    return EmulatedGpu.active


class EmulatedGpu(TorchDispatchMode):
    """While it is entered, `cuda` is the emulated device. Counts what the host and the device wait for."""

    active: "EmulatedGpu | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.to_device: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        """Synchronisations: copies, unless they are non-blocking and of pinned memory, and values read by the host."""
        self._pinned: dict[int, Tensor] = {}  # by address; held, so that no other tensor gets it
        self._patches = [
            patch("torch.cuda._lazy_init", lambda: None),
            patch("torch.cuda.Stream", _Stream),
            patch("torch.cuda.current_stream", lambda *args: _Stream()),
            patch("torch.cuda.stream", lambda stream: nullcontext()),
            patch("torch.nn.functional.scaled_dot_product_attention", self._attention),
        ]

    def clear(self) -> None:
        for counter in (self.to_device, self.to_host, self.waits):
            counter.clear()

    def waited(self) -> None:
        self.waits[_project_function()] += 1

    def __enter__(self) -> "EmulatedGpu":
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for each in self._patches:
            each.start()
        EmulatedGpu.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        EmulatedGpu.active = None
        for each in self._patches:
            each.stop()
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One operation of torch, on the numbers of its tensors; the result is where the operation puts it."""
        name = _name(func)
        if func is torch.ops.prim.device.default:
            return CUDA
        leaves = _leaves(args, kwargs)
        if name == "aten.is_pinned.default":
            return self._is_pinned(args[0])
        if name in ("aten.pin_memory.default", "aten._pin_memory.default"):  # the first one in inference mode
            return self._pin(args[0].clone())
        self._check(name, args, leaves)
        on_gpu = _result_is_on_gpu(name, args, leaves)
        self._count(name, args, kwargs, leaves, on_gpu)
        pin = kwargs.get("pin_memory")
        bare = {key: _mapped(_bare, value) for key, value in kwargs.items() if key != "pin_memory"}
        result = func(*[_mapped(_bare, value) for value in args], **bare)
        if func._schema.is_mutable and isinstance(result, Tensor):
            for given in leaves:
                if isinstance(given, GpuTensor) and given.inner is result and given.shape == result.shape:
                    return given
        if pin:
            return self._pin(result)
        return _mapped(_wrapped, result) if on_gpu else result

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """The CPU's own kernel, which torch would not take for tensors of a GPU. It has no gradient."""
        leaves = _leaves(args, kwargs)
        self._check("scaled_dot_product_attention", args, leaves)
        bare = {key: _bare(value) for key, value in kwargs.items()}
        result = scaled_dot_product_attention(*map(_bare, args), **bare)
        return _wrapped(result) if _on_gpu(leaves) else result

    def _check(self, name: str, args: Sequence[Any], leaves: Sequence[Any]) -> None:
        """Raise for tensors of both devices, except for what CUDA allows: copies, scalars, indices on the CPU."""
        if not _on_gpu(leaves) or name in COPIES:
            return
        cpu = [tuple(leaf.shape) for leaf in leaves if _is_cpu(leaf) and leaf.dim() > 0]
        if cpu and "index" in name and isinstance(args[0], GpuTensor) and not any(map(_is_cpu, args[2:])):
            self.to_device[_project_function()] += 1
            self.waited()
        elif cpu:
            raise RuntimeError(f"{name}: found tensors on two devices, cuda:0 and cpu; those of shape {cpu} are on cpu")

    def _count(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any], on_gpu: bool
    ) -> None:
        masked = name == "aten.index.Tensor" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if (name in WAITS or masked) and _on_gpu(leaves):
            self.waited()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name not in COPIES or not tensors:
            return
        into, source = (args[0], args[1]) if name == "aten.copy_.default" else (None, tensors[0])
        if isinstance(source, GpuTensor) == on_gpu:
            return
        (self.to_device if on_gpu else self.to_host)[_project_function()] += 1
        at_once = kwargs.get("non_blocking") or (into is not None and len(args) > 2 and args[2])
        if not (at_once and self._is_pinned(source if on_gpu else into)):
            self.waited()

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor | None) -> bool:
        return _is_cpu(tensor) and tensor.untyped_storage().data_ptr() in self._pinned


_name = functools.cache(str)  # of an operation


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments of an operation, those in lists, too."""
    found: list[Any] = []
    for value in (*args, *kwargs.values()):
        found.extend(value) if isinstance(value, (list, tuple)) else found.append(value)
    return found


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(map(function, value)) if type(value) in (list, tuple) else function(value)


def _on_gpu(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, GpuTensor) for leaf in leaves)


def _is_cpu(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, GpuTensor)


def _result_is_on_gpu(name: str, args: Sequence[Any], leaves: Sequence[Any]) -> bool:
    if devices := [leaf for leaf in leaves if isinstance(leaf, torch.device)]:
        return devices[-1].type == "cuda"
    if name in ("aten.to.other", "aten.type_as.default"):
        return isinstance(args[1], GpuTensor)
    if name == "aten.copy_.default":
        return isinstance(args[0], GpuTensor)
    return _on_gpu(leaves)


def _bare(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return CPU
    return leaf.inner if isinstance(leaf, GpuTensor) else leaf


def _wrapped(leaf: Any) -> Any:
    return GpuTensor(leaf) if _is_cpu(leaf) else leaf


def _project_function() -> str:
    """The innermost function of this project that runs, as module.function: lines move, and libraries vary."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file != __file__ and file.startswith(PROJECT) and "site-packages" not in file:
            return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"
