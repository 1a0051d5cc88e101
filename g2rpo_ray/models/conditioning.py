"""Prompts as inputs of the transformer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from g2rpo_ray.types import PromptEmbedding


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Arguments of the transformer for K prompts, by name: a tensor [K, ...] or a list of K tensors each."""

    prompt: Mapping[str, Any]
    negative: Mapping[str, Any] | None = None
    """Arguments for one or K negative prompts. If given, the velocity has guidance and costs two evaluations."""


def expanded(arguments: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Each argument with n rows, from n rows or one."""
    return {
        name: value.expand(n, *value.shape[1:]) if isinstance(value, Tensor) else value and value * (n // len(value))
        for name, value in arguments.items()
    }


def on_device(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [on_device(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value


def negatives(embeddings: Sequence[PromptEmbedding]) -> list[PromptEmbedding] | None:
    """The negative prompts of K prompts: an embedding each, or one if it is the same for all; None without any."""
    by_prompt = {away.prompt: away for away in (embedding.negative for embedding in embeddings) if away is not None}
    if len(by_prompt) < 2:
        return list(by_prompt.values()) or None
    return [embedding.negative for embedding in embeddings if embedding.negative is not None]
