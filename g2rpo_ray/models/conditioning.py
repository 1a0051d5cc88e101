"""Prompts as the transformer takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from g2rpo_ray.types import PromptEmbedding


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Prompts as arguments of the transformer, by their names: a tensor [K, ...] or a list of K tensors each."""

    prompt: Mapping[str, Any]
    negative: Mapping[str, Any] | None = None
    """Of one prompt, or of K. Given, the velocity has classifier-free guidance, and costs two evaluations."""


def expanded(arguments: Mapping[str, Any], n: int) -> dict[str, Any]:
    """n rows of each, of as many or of one."""
    return {
        name: value.expand(n, *value.shape[1:]) if isinstance(value, Tensor) else value and value * (n // len(value))
        for name, value in arguments.items()
    }


def on_device(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [on_device(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value


def negatives(embeddings: Sequence[PromptEmbedding]) -> list[PromptEmbedding] | None:
    """What K prompts guide away from: an embedding each, or one if it is the same for all; None if there is none."""
    by_prompt = {away.prompt: away for away in (embedding.negative for embedding in embeddings) if away is not None}
    if len(by_prompt) < 2:
        return list(by_prompt.values()) or None
    return [embedding.negative for embedding in embeddings if embedding.negative is not None]
