"""What makes rollout's velocities cheaper than training's, and changes them by rounding alone. For inference only."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from g2rpo_ray.models.base import family_of


def fold_lora(transformer: nn.Module) -> None:
    """Have each LoRA layer add itself to its base layer's output in one product, in the base's dtype.

    PEFT widens the activations to the LoRA's float32, multiplies there, scales and adds: on a bfloat16 base that is six
    passes over tensors of twice the size, and products at a fraction of the rate.
    """
    for module in transformer.modules():
        if isinstance(module, LoraLinear):
            module.forward = partial(_lora_linear, module)  # type: ignore[method-assign]


def _lora_linear(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    for adapter in layer.active_adapters:
        down, up = (part[adapter].weight.to(x.dtype) for part in (layer.lora_A, layer.lora_B))
        low = F.linear(x, down).flatten(0, -2)
        result.view(len(low), -1).addmm_(low, up.T, alpha=layer.scaling[adapter])
    return result


@contextmanager
def one_prompt(transformer: nn.Module) -> Iterator[None]:
    """Inside, all calls are for one prompt, guidance and resolution: what depends on these alone is evaluated once."""
    family, names = family_of(transformer), {name for name, _ in transformer.named_modules()}
    stands_in: dict[str, nn.Module] = {name: _Once(transformer.get_submodule(name)) for name in family.once}
    stands_in |= {name: _OneRow(transformer.get_submodule(name)) for name in family.once_a_row if name in names}
    originals = {name: transformer.get_submodule(name) for name in stands_in}
    try:
        for name, module in stands_in.items():
            transformer.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            transformer.set_submodule(name, module)


class _Once(nn.Module):
    """Evaluates a module at the first call, and gives that result at every call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._result: Any = None

    def forward(self, x: Tensor) -> Any:
        if self._result is None:
            self._result = self._module(x)
        return self._result


class _OneRow(_Once):
    """The same for an input whose rows are all alike: evaluates one of them, whatever their number."""

    def forward(self, x: Tensor) -> Tensor:
        row: Tensor = super().forward(x[:1])
        return row.expand(len(x), *row.shape[1:])
