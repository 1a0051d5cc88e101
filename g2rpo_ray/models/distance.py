"""The relative change of the weights by a LoRA."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LoraDistance:
    """‖s·(BA − B₀A₀)‖ / ‖W‖ over all layers: Frobenius norm of the learned change over that of the layers' weights."""

    def __init__(self, transformer: nn.Module, scale: float, start: Mapping[str, Tensor] | None = None):
        """
        Args:
            scale: s, alpha / rank.
            start: A₀ [rank, in] and B₀ [out, rank] by name; None: the product is 0.
        """
        self._scale, self._start = scale, start
        self._layers = [name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A." in name]
        weights = [transformer.get_parameter(f"{layer}.base_layer.weight") for layer in self._layers]
        self._norm = math.sqrt(sum(float(weight.detach().float().square().sum()) for weight in weights))

    @torch.no_grad()
    def __call__(self, lora: Mapping[str, Tensor]) -> float:
        """The distance of a state, by the names of `lora_parameters`."""
        total = 0.0
        for layer in self._layers:
            now = _factors(lora, layer)
            total += _inner(now, now)
            if self._start is not None:
                start = [factor.to(now[0].device) for factor in _factors(self._start, layer)]
                total += _inner(start, start) - 2 * _inner(now, start)
        return self._scale * math.sqrt(max(total, 0.0)) / self._norm


def _factors(lora: Mapping[str, Tensor], layer: str) -> list[Tensor]:
    return [lora[f"{layer}.lora_{part}.weight"] for part in ("A", "B")]


def _inner(one: list[Tensor], other: list[Tensor]) -> float:
    """⟨B₁A₁, B₂A₂⟩, computed with matrices [rank, rank]."""
    (a, b), (c, d) = ((factor.double() for factor in pair) for pair in (one, other))
    return float(((b.T @ d) * (a @ c.T)).sum())
