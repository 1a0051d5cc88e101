"""Quantized weights, through torchao, for velocities that no likelihood depends on."""

import re
from typing import Any

import torch
from torch import nn

CONFIGURATIONS = {
    "int8": "Int8DynamicActivationInt8WeightConfig",
    "int8_weights": "Int8WeightOnlyConfig",
    "float8": "Float8DynamicActivationFloat8WeightConfig",
    "float8_weights": "Float8WeightOnlyConfig",
}
"""torchao's, by `rollout.completions.quantization`."""
MULTIPLE = 16  # of both sizes of a layer, as 8-bit kernels require


def quantize(transformer: nn.Module, kind: str, device: str) -> None:
    """Quantizes the linear layers of the blocks, one by one on `device`; their LoRA does not change.

    Raises:
        ValueError: one line; torchao is not installed, or does not know how on this device.
    """
    try:
        from torchao import quantization
    except ImportError:
        raise ValueError(
            f"rollout.completions.quantization: {kind} given, which needs torchao; pip install 'g2rpo_ray[completions]'"
        ) from None
    try:
        configuration = getattr(quantization, CONFIGURATIONS[kind])()
        quantization.quantize_(transformer, configuration, is_quantized, device=torch.device(device))
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"rollout.completions.quantization: {kind} given; not usable on {device}: {reason}") from None


def is_quantized(module: nn.Module, name: str) -> bool:
    """True if a layer, by its full name, is a linear layer of a block, and not of a LoRA.

    Blocks are the transformer's lists. Layers before and after them are few, and most sensitive to rounding.
    """
    if not isinstance(module, nn.Linear) or ".lora_" in name or not re.match(r"\w+\.\d+\.", name):
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def quantized_bytes(transformer: nn.Module) -> int:
    """Bytes of the weights, with one byte per quantized weight, without scales."""
    sizes: dict[Any, int] = {p: p.numel() * p.element_size() for p in transformer.parameters()}
    for name, module in transformer.named_modules():
        if is_quantized(module, name):
            sizes[module.weight] = module.weight.numel()
    return sum(sizes.values())
