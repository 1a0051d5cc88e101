"""Prompt embeddings: encoded once into Parquet, then handed out through the object store."""

from collections.abc import Sequence
from typing import Any

import ray

from g2rpo_ray.config import Config, ray_options
from g2rpo_ray.data import EmbeddingStore, fingerprint
from g2rpo_ray.types import PromptEmbedding

PART = 64  # prompts a Parquet file: what a kill in the middle loses at most


@ray.remote(max_calls=1)  # its process ends with it, and the text encoders leave the device
def _encode(config: Config, directory: str, prompts: Sequence[str]) -> str:
    """Encode the prompts that the store lacks; the fingerprint under which it keeps them."""
    from g2rpo_ray.models import FluxModel

    key = fingerprint(config.model)
    store = EmbeddingStore(directory, key)
    missing = store.missing(prompts)
    if missing:
        model = FluxModel.load(config.model, config.data.encoder_device, text_encoders=True)
        for at in range(0, len(missing), PART):
            store.add(model.encode(missing[at : at + PART]))
    return key


@ray.remote(num_cpus=0)
def _read(directory: str, key: str, prompts: Sequence[str]) -> list[PromptEmbedding] | PromptEmbedding:
    found = EmbeddingStore(directory, key).get(prompts)
    return found if len(found) > 1 else found[0]  # Ray unpacks a list only where it has several returns


class Embeddings:
    """The encoded prompts of a run. Every node must see `directory`."""

    def __init__(self, config: Config, directory: str):
        self._config = config
        self._directory = directory
        self._key = ""

    async def encode(self, prompts: Sequence[str]) -> None:
        """Encode what is not there yet, in one process that ends with it."""
        task = _encode.options(**ray_options(self._config.data.encoder_resources))
        self._key = await task.remote(self._config, self._directory, prompts)

    def refs(self, prompts: Sequence[str]) -> list[ray.ObjectRef]:
        """References to the embeddings, in the order of the prompts."""
        refs: Any = _read.options(num_returns=len(prompts)).remote(self._directory, self._key, prompts)
        return refs if len(prompts) > 1 else [refs]
