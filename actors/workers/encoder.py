"""Prompt embeddings: encoded once into Parquet, then handed out through the object store."""

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from g2rpo_ray.actors.pool.device_faults import device_faults
from g2rpo_ray.actors.pool.failures import first_line, is_death
from g2rpo_ray.actors.pool.limits import Hung, within
from g2rpo_ray.config import Config, ray_options
from g2rpo_ray.data import EmbeddingStore, encode_missing, fingerprint, negative_prompts
from g2rpo_ray.data.pictures import PictureFile, open_sources, sources_by_prompt
from g2rpo_ray.numerics import set_up_torch
from g2rpo_ray.types import Metadata, PromptEmbedding, sources_of

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0  # between two lines about a long encoding
READ_TIMEOUT_S = 120.0  # of the embeddings of an iteration, or of the held-out prompts
MAX_ATTEMPTS = 3  # processes that may die in one encoding; each continues where the last one stopped
Say = Callable[[str], None]
Sources = Mapping[str, tuple[PictureFile, ...]]
"""By `types.sources_of` their prompts."""


@dataclass(frozen=True, slots=True)
class _Progress:
    """Progress of an encoding; the first one is sent before the model is loaded."""

    key: str  # fingerprint under which the store keeps the embeddings
    missing: int  # prompts to encode
    shapes: tuple[tuple[int, ...], ...] = ()  # of the tensors of the longest prompt's embedding
    outdated: tuple[str, ...] = ()  # folders written by an earlier version
    damaged: tuple[str, ...] = ()  # parts that were deleted
    done: int = 0
    seconds: float = 0.0
    cut: str = ""  # a line about prompts that were truncated since the last one


def encode_prompts(
    config: Config, directory: str, prompts: Sequence[str], sources: Sources = MappingProxyType({})
) -> Iterator[_Progress]:
    """Encode the prompts that the store lacks; yields the progress before and after each part."""
    with device_faults():
        yield from _encoding(config, directory, prompts, sources)


def _encoding(config: Config, directory: str, prompts: Sequence[str], sources: Sources) -> Iterator[_Progress]:
    key = fingerprint(config.model)
    store = EmbeddingStore(directory, key)
    missing = store.missing(prompts)
    unknown = store.missing(negative_prompts(config.model.negative_prompt, prompts), "negative")
    if not missing and not unknown:
        yield _Progress(key, 0)
        return
    from g2rpo_ray.models import FlowModel

    set_up_torch(config.deterministic)
    # loads no weights, but refuses a model that cannot be loaded
    shapes = tuple(FlowModel.load(config.model, config.data.encoder_device).stored_shapes().values())
    start = _Progress(key, len(missing), shapes, tuple(store.outdated()), tuple(store.damaged))
    yield start
    model = FlowModel.load(config.model, config.data.encoder_device, text_encoders=True)

    def encode(part: Sequence[str], negative: bool = False) -> list[PromptEmbedding]:
        return model.encode(part, open_sources(part, sources), negative=negative)

    for _ in encode_missing(store, unknown, partial(encode, negative=True), "negative"):
        yield replace(start, missing=0)  # nothing to announce again
    for done, seconds in encode_missing(store, missing, encode):
        yield replace(start, done=done, seconds=seconds, cut=model.take_cut_message())
    yield replace(start, done=len(missing), cut=model.take_cut_message())  # if only the negative prompt was missing


# Its process ends with the task, which frees the device. Ray's own retries would repeat what was yielded.
_encode = ray.remote(max_calls=1, max_retries=0)(encode_prompts)


# An actor, because the process of a task would have to start again in each iteration, which takes half a second.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Reader:
    def __init__(self, directory: str, key: str, negative: str | None):
        self._store, self._negative = EmbeddingStore(directory, key), negative

    def read(self, prompts: Sequence[str]) -> list[PromptEmbedding | None]:
        """The embeddings, each as an object of its own, and a last one that signals that they are stored."""
        return [*self._store.get(prompts, self._negative), None]


class Embeddings:
    """The encoded prompts of a run. Every node must see `directory`."""

    def __init__(self, config: Config, directory: str, metadata: Mapping[str, Metadata] = MappingProxyType({})):
        """`metadata`: by prompt, what has the sources."""
        self._config, self._sources = config, sources_by_prompt(metadata)
        self._directory = directory
        self._key = ""
        self._reader: Any = None

    async def encode(self, prompts: Sequence[str], say: Say = print) -> None:
        """Encode missing prompts in a process that ends afterwards; `say` receives a line about the progress."""
        for left in reversed(range(MAX_ATTEMPTS)):
            try:
                await self._encode_once(prompts, say)
                # on this node, which has the directory; the head may not
                here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
                reader = _Reader.options(scheduling_strategy=here)  # type: ignore[attr-defined]
                self._reader = reader.remote(self._directory, self._key, self._config.model.negative_prompt)
                return
            except Exception as error:
                if not left or not (is_death(error) or isinstance(error, Hung)):
                    raise
                logger.warning("the process that encodes prompts died, another one continues: %s", first_line(error))

    async def _encode_once(self, prompts: Sequence[str], say: Say) -> None:
        data, rollout = self._config.data, self._config.rollout
        # Ray's types know neither generators nor that their references can be awaited
        task: Any = _encode.options(**ray_options(data.encoder_resources, rollout.runtime_env))
        said = 0.0
        needed = set(map(sources_of, prompts))
        sources = {name: files for name, files in self._sources.items() if name in needed}
        generator: Any = task.remote(self._config, self._directory, prompts, sources)
        async for progress in self._parts(generator):
            self._key = progress.key
            if progress.cut:
                say(progress.cut)
            if progress.missing and not progress.done:
                say(self._announcement(progress, len(prompts) - progress.missing))
            elif progress.done < progress.missing and (not said or progress.seconds - said > LOG_INTERVAL_S):
                said = progress.seconds
                say(f"encoded {progress.done} of {progress.missing} prompts, {_to_go(progress)} to go")

    async def _parts(self, generator: Any) -> AsyncIterator[_Progress]:
        """The progress of an encoding. A hung process is killed; its start may wait for a node."""
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
        older = f"; ignored, of an earlier version: {', '.join(progress.outdated)}" if progress.outdated else ""
        older += f"; deleted, because damaged: {', '.join(progress.damaged)}" if progress.damaged else ""
        return (
            f"encoding {progress.missing} prompts ({stored} are already stored): {shapes} {dtype}, at most "
            f"{_size(each)} a prompt, {_size(each * progress.missing)} in {self._directory}{older}"
        )

    async def refs(self, prompts: Sequence[str]) -> list[ray.ObjectRef]:
        """References to the embeddings, in the order of the prompts, once they are stored."""
        for left in reversed(range(MAX_ATTEMPTS)):
            *refs, there = self._reader.read.options(num_returns=len(prompts) + 1).remote(prompts)
            try:
                await within(READ_TIMEOUT_S, f"reading embeddings from {self._directory}", there)
                return refs
            except Hung as error:
                if not left:
                    raise
                logger.warning("the process that reads embeddings hung and is restarted: %s", error)
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
