"""The arithmetic of a LoRA layer: in its base's dtype, added to the base's output by one product.

PEFT widens the activations to the LoRA's float32, multiplies there, scales and adds: on a bfloat16 base that is six
passes over tensors of twice the size, and products at a fraction of the rate. Rollout and learner both fold, so that
they round alike: on one device, with the same kernels, they compute the same bits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from g2rpo_ray.models.lora import ADAPTER


def fold_lora(transformer: nn.Module) -> None:
    """Makes each LoRA layer compute in its base's dtype; the LoRA's gradients keep the LoRA's dtype."""
    for module in _layers(transformer).values():
        module.replacement = None  # (A, B) of another policy; as an attribute, an input of compiled graphs
        module.forward = partial(_folded, module)
        for down, up in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
            down.forward = partial(_down, down)
            up.forward = partial(_up, up)


@contextmanager
def lora_replaced(transformer: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the folded LoRA layers use these tensors instead of their parameters. For inference only.

    The parameters are not changed, since ZeRO may partition them.
    """
    layers = _layers(transformer)
    before = {name: layer.replacement for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.replacement = tuple(state[f"{name}.lora_{part}.weight"] for part in "AB")
        yield
    finally:
        for name, layer in layers.items():
            layer.replacement = before[name]


def _layers(transformer: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLinear)}


def _folded(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer.base_layer(x)
    if layer.replacement is not None:
        down, up = layer.replacement
        return _added(result, F.linear(x, down.to(x.dtype)), up, layer.scaling[ADAPTER])
    if layer.disable_adapters:
        return result
    for adapter in layer.active_adapters:  # called as modules, because ZeRO-3 gathers weights in the call
        result = layer.lora_B[adapter](layer.lora_A[adapter](x), result, layer.scaling[adapter])
    return result


def _down(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype))


def _up(linear: nn.Linear, low: Tensor, result: Tensor, scaling: float) -> Tensor:
    return _added(result, low, linear.weight, scaling)


def _added(result: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
    """result + scaling · low upᵀ, with one rounding; in place if gradients are disabled."""
    flat = result.view(-1, result.shape[-1])
    add = flat.addmm if torch.is_grad_enabled() else flat.addmm_
    return add(low.flatten(0, -2), up.to(low.dtype).T, alpha=scaling).view(result.shape)
