"""Prompt embeddings: encoded once into Parquet, then handed out through the object store."""

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.failures import Hung, first_line, is_death, within
from g2rpo_ray.config import Config, ray_options
from g2rpo_ray.data import EmbeddingStore, encode_missing, fingerprint
from g2rpo_ray.types import PromptEmbedding

logger = logging.getLogger(__name__)

SAY_EVERY = 60.0  # seconds between two lines about a long encoding
READ_S = 120.0  # for the embeddings of an iteration, or of the held-out prompts
ATTEMPTS = 3  # processes that may die over one encoding; each goes on where the last one was
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far the encoding is; the first one comes before the model is loaded."""

    key: str  # fingerprint under which the store keeps the embeddings
    missing: int  # prompts to encode
    shapes: tuple[tuple[int, ...], ...] = ()  # of the tensors of the longest prompt's embedding
    outdated: tuple[str, ...] = ()  # folders that an earlier version of the program wrote
    done: int = 0
    seconds: float = 0.0


# Its process ends with it, and the text encoders leave the device. Ray's own retries would repeat what was yielded.
@ray.remote(max_calls=1, max_retries=0)
def _encode(config: Config, directory: str, prompts: Sequence[str]) -> Iterator[_Progress]:
    """Encode the prompts that the store lacks, and tell before and after each part how far it is."""
    key = fingerprint(config.model)
    store = EmbeddingStore(directory, key)
    missing, negative = store.missing(prompts), config.model.negative_prompt
    unknown = [] if negative is None else store.missing([negative], "negative")
    if not missing and not unknown:
        yield _Progress(key, 0)
        return
    from g2rpo_ray.models import FlowModel

    # no part of it: refuses what can't be loaded
    shapes = tuple(FlowModel.load(config.model, config.data.encoder_device).embedding_shapes().values())
    start = _Progress(key, len(missing), shapes, tuple(store.outdated()))
    yield start
    model = FlowModel.load(config.model, config.data.encoder_device, text_encoders=True)
    if unknown:
        store.add(model.encode(unknown, negative=True), "negative")
    for done, seconds in encode_missing(store, missing, model.encode):
        yield replace(start, done=done, seconds=seconds)


# An actor: the process of a task would be gone by the next iteration, and take half a second to start again.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Reader:
    def __init__(self, directory: str, key: str, negative: str | None):
        self._store, self._negative = EmbeddingStore(directory, key), negative

    def read(self, prompts: Sequence[str]) -> list[PromptEmbedding | None]:
        """The embeddings, each an object of its own, and a last one that tells that they are there."""
        return [*self._store.get(prompts, self._negative), None]


class Embeddings:
    """The encoded prompts of a run. Every node must see `directory`."""

    def __init__(self, config: Config, directory: str):
        self._config = config
        self._directory = directory
        self._key = ""
        self._reader: Any = None

    async def encode(self, prompts: Sequence[str], say: Say = print) -> None:
        """Encode what is not there yet, in one process that ends with it; `say` is told how much, how long."""
        for left in reversed(range(ATTEMPTS)):
            try:
                await self._encode_once(prompts, say)
                # on this node, which sees the directory; a bare head may not
                here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
                reader = _Reader.options(scheduling_strategy=here)  # type: ignore[attr-defined]
                self._reader = reader.remote(self._directory, self._key, self._config.model.negative_prompt)
                return
            except Exception as error:
                if not left or not (is_death(error) or isinstance(error, Hung)):
                    raise
                logger.warning("the process that encodes prompts is gone, another goes on: %s", first_line(error))

    async def _encode_once(self, prompts: Sequence[str], say: Say) -> None:
        task = _encode.options(**ray_options(self._config.data.encoder_resources))
        said = 0.0
        # Ray's types know neither generators nor that their references can be awaited
        generator: Any = task.remote(self._config, self._directory, prompts)
        async for progress in self._parts(generator):
            self._key = progress.key
            if progress.missing and not progress.done:
                say(self._announcement(progress, len(prompts) - progress.missing))
            elif progress.done < progress.missing and (not said or progress.seconds - said > SAY_EVERY):
                said = progress.seconds
                say(f"encoded {progress.done} of {progress.missing} prompts, {_to_go(progress)} to go")

    async def _parts(self, generator: Any) -> AsyncIterator[_Progress]:
        """What an encoding yields. A process that does not go on in time ends; its start may wait for a node."""
        what = "encoding prompts (does the cluster have what data.encoder_resources asks for?)"
        limit = self._config.startup_timeout_s
        while True:
            try:
                ref = await within(limit, what, anext(generator))
            except StopAsyncIteration:
                return
            except Hung:
                ray.cancel(generator, force=True)
                raise
            limit, what = self._config.hung_after_s, "encoding prompts"
            yield await ref

    def _announcement(self, progress: _Progress, stored: int) -> str:
        dtype = self._config.model.dtype
        each = sum(map(math.prod, progress.shapes)) * (4 if dtype == "float32" else 2)
        shapes = ", ".join(" × ".join(map(str, shape)) for shape in progress.shapes)
        older = f"; not read: {', '.join(progress.outdated)}, of an earlier version" if progress.outdated else ""
        return (
            f"encoding {progress.missing} prompts ({stored} are stored already): {shapes} {dtype}, at most "
            f"{_size(each)} a prompt, {_size(each * progress.missing)} in {self._directory}{older}"
        )

    async def refs(self, prompts: Sequence[str]) -> list[ray.ObjectRef]:
        """References to the embeddings, in the order of the prompts, once they are there."""
        for left in reversed(range(ATTEMPTS)):
            *refs, there = self._reader.read.options(num_returns=len(prompts) + 1).remote(prompts)
            try:
                await within(READ_S, f"reading embeddings from {self._directory}", there)
                return refs
            except Hung as error:
                if not left:
                    raise
                logger.warning("the process that reads embeddings is taken for hung, it starts again: %s", error)
                ray.kill(self._reader, no_restart=False)
        raise AssertionError("not reached")


def _to_go(progress: _Progress) -> str:
    seconds = progress.seconds / progress.done * (progress.missing - progress.done)
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
