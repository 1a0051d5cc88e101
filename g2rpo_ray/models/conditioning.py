"""Prompts as the transformer takes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Prompts as arguments of the transformer, by their names: a tensor [K, ...] or a list of K tensors each."""

    prompt: Mapping[str, Any]
    negative: Mapping[str, Any] | None = None
    """Of one prompt. Given, the velocity has classifier-free guidance, and costs two evaluations."""


def expanded(arguments: Mapping[str, Any], n: int) -> dict[str, Any]:
    """n rows of each, of as many or of one."""
    return {
        name: value.expand(n, *value.shape[1:]) if isinstance(value, Tensor) else value and value * (n // len(value))
        for name, value in arguments.items()
    }


def on_device(value: Any, device: str) -> Any:
    return (
        [part.to(device) for part in value]
        if isinstance(value, list)
        else value.to(device)
        if value is not None
        else None
    )
