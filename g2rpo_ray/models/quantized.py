"""Quantized weights, through torchao, for velocities that no likelihood depends on."""

import re
from functools import partial
from typing import Any

import torch
from torch import nn

BYTES = {"int8": 1.0, "int8_weights": 1.0, "float8": 1.0, "float8_weights": 1.0, "int4_weights": 0.5, "nvfp4": 0.5,
         "nvfp4_weights": 0.5}  # fmt: skip
"""Of a weight, without scales, by `rollout.completions.quantization`. On a CPU a weight in int4 takes one byte."""
MULTIPLE = 16  # of both sizes of a layer, as 8-bit kernels require
GROUP = 32  # weights in a row that share a scale, in int4


def _configuration(ao: Any, kind: str, device: str) -> Any:
    """The configuration of a kind; `ao`: torchao's module `quantization`."""
    if kind.startswith("nvfp4"):
        from torchao.prototype import mx_formats

        both = mx_formats.NVFP4DynamicActivationNVFP4WeightConfig
        return mx_formats.NVFP4WeightOnlyConfig() if kind == "nvfp4_weights" else both()
    if kind == "int4_weights":
        int4 = torch.int4  # type: ignore[attr-defined]  # torch's stubs omit it
        anywhere = partial(ao.IntxWeightOnlyConfig, int4, ao.PerGroup(GROUP))
        return ao.Int4WeightOnlyConfig(group_size=GROUP) if device == "cuda" else anywhere()
    of_kind = {
        "int8": ao.Int8DynamicActivationInt8WeightConfig,
        "int8_weights": ao.Int8WeightOnlyConfig,
        "float8": ao.Float8DynamicActivationFloat8WeightConfig,
        "float8_weights": ao.Float8WeightOnlyConfig,
    }
    return of_kind[kind]()


def quantize(transformer: nn.Module, kind: str, device: str) -> None:
    """Quantizes the linear layers of the blocks, one by one on `device`; their LoRA does not change.

    Raises:
        ValueError: one line; torchao is not installed, or does not know how on this device.
    """
    try:
        from torchao import quantization as ao
    except ImportError:
        raise ValueError(
            f"rollout.completions.quantization: {kind} given, which needs torchao; pip install 'g2rpo_ray[completions]'"
        ) from None
    try:
        which = partial(is_quantized, multiple=GROUP if kind == "int4_weights" else MULTIPLE)
        ao.quantize_(transformer, _configuration(ao, kind, device), which, device=torch.device(device))
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"rollout.completions.quantization: {kind} given; not usable on {device}: {reason}") from None


def is_quantized(module: nn.Module, name: str, multiple: int = MULTIPLE) -> bool:
    """True if a layer, by its full name, is a linear layer of a block, and not of a LoRA, and of such sizes.

    Blocks are the transformer's lists. Layers before and after them are few, and most sensitive to rounding.
    """
    if not isinstance(module, nn.Linear) or ".lora_" in name or not re.match(r"\w+\.\d+\.", name):
        return False
    return module.in_features % multiple == 0 and module.out_features % multiple == 0


def quantized_bytes(transformer: nn.Module, kind: str) -> int:
    """Bytes of the weights, without scales."""
    sizes: dict[Any, int] = {p: p.numel() * p.element_size() for p in transformer.parameters()}
    for name, module in transformer.named_modules():
        if is_quantized(module, name):
            sizes[module.weight] = int(BYTES[kind] * module.weight.numel())
    return sum(sizes.values())
