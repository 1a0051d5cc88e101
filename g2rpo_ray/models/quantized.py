"""Quantised weights, through torchao: for velocities that no likelihood rests on."""

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
MULTIPLE = 16  # of both sizes of a layer, which kernels of eight bits need


def quantize(transformer: nn.Module, kind: str, device: str) -> None:
    """Quantise the linear layers of the blocks, one after the other on `device`; their LoRA stays as it is.

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
    """Whether a layer, by its full name, is a linear one of a block, and none of a LoRA.

    Blocks are what the transformer has in lists; layers before and after them are few, and rounding hurts most there.
    """
    if not isinstance(module, nn.Linear) or ".lora_" in name or not re.match(r"\w+\.\d+\.", name):
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def quantized_bytes(transformer: nn.Module) -> int:
    """Bytes of the weights with a byte for each one that is quantised, scales left out."""
    sizes: dict[Any, int] = {p: p.numel() * p.element_size() for p in transformer.parameters()}
    for name, module in transformer.named_modules():
        if is_quantized(module, name):
            sizes[module.weight] = module.weight.numel()
    return sum(sizes.values())
