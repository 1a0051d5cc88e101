"""Prompts' embeddings in Parquet, encoded once and shared between runs of the same model.

Layout: `<directory>/<fingerprint>/part-<unique>.parquet`. A row is one prompt in one role. It is also a row group, so
that reading one prompt (4 MB for FLUX) reads nothing else. Its tensors have the names of the pipeline's arguments.
Every row has a digest, which is checked at each read. A damaged part is deleted, and its prompts are encoded again.
Parquet's own checksums cover only pages, not their positions. Rows of older versions without digests are not checked.
"""

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.paths import resolve
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import PromptEmbedding, StoredTensor, sources_of

logger = logging.getLogger(__name__)

Role = Literal["prompt", "negative"]

LAYOUT = 2
PART = 64  # prompts in a Parquet file, and the most that a killed encoding loses
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
PART_NAME = re.compile(r"part-\w+\.parquet")
VERIFY_S = 60.0  # for verifying parts before anything starts; the others are verified when they are used
FIRST_PART = 8  # prompts; small, to estimate the duration early
NOT_ENCODING = ("transformer", "transformer_2", "vae", "scheduler")  # parts of a pipeline
STORED_AS: dict[str, np.dtype[Any]] = {
    name: np.dtype(stored)
    for name, stored in {
        "float32": "<f4", "bfloat16": "<i2", "float16": "<f2", "int64": "<i8", "int32": "<i4", "bool": "?",
    }.items()
}  # fmt: skip
TENSOR = {"name": pa.string(), "dtype": pa.string(), "shape": pa.list_(pa.int32()), "data": pa.binary()}
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "role": pa.string(),
        "tensors": pa.list_(pa.struct(list(TENSOR.items()))),
        "sha256": pa.binary(),
    }
)


UNREADABLE = (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError)  # what damage comes to
T = TypeVar("T")


def fingerprint(config: ModelConfig) -> str:
    """SHA-256 of everything that affects an embedding: encoders, tokenizers, pipeline, dtype, length, diffusers.

    A local pipeline is identified by the content of its files, so that it can be moved but not changed. One on the hub
    is identified by id and revision.
    """
    version = metadata.version("diffusers").rpartition(".")[0]  # importing it takes seconds
    digest = hashlib.sha256(f"{LAYOUT}\0{version}\0{config.dtype}\0{config.max_sequence_length}\0".encode())
    digest.update(f"{config.family}\0".encode() if config.family else b"")
    digest.update(f"{config.source_area}\0".encode() if config.source_area else b"")
    root = Path(resolve(config.path))
    if not root.is_dir():
        digest.update(f"{config.path}\0{config.revision}".encode())
        return digest.hexdigest()
    index = root / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {}
    digest.update(f"{parts.get('_class_name')}\0".encode())
    unused = tuple(part for part in NOT_ENCODING if part != "vae" or not config.sources)  # it encodes sources
    folders = sorted(part for part, value in parts.items() if isinstance(value, list) and part not in unused)
    for file in sorted(file for folder in folders for file in (root / folder).rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()


class DamagedPart(ValueError):
    """A part was damaged and is deleted; its prompts are now missing."""


class EmbeddingStore:
    """The embeddings with one fingerprint. It knows those that existed when it was opened, and those it adds.

    Any number of processes may add concurrently: parts have unique names, and duplicates of a prompt are equivalent.
    """

    def __init__(self, directory: str | Path, fingerprint: str, read_only: bool = False) -> None:
        """With `read_only`, damaged parts are not deleted, but their prompts are missing."""
        self._directory, self._key, self._read_only = Folder(directory), fingerprint, read_only
        self._folder = self._directory / fingerprint
        self._places: dict[tuple[str, str], tuple[str, int]] = {}  # prompt, role -> file, row
        self._verified: set[str] = set()
        self.damaged: list[str] = []
        """Names of damaged parts that were deleted."""
        for file in self._parts(self._folder):
            with suppress(DamagedPart):
                self._note(file, self._read_part(file, _keys))

    def missing(self, prompts: Sequence[str], role: Role = "prompt") -> list[str]:
        """The `prompts` that are not stored, in order, without repetitions.

        The parts of stored ones are verified for at most `VERIFY_S` seconds; prompts of damaged parts are missing.
        """
        wanted, deadline = list(dict.fromkeys(prompts)), time.monotonic() + VERIFY_S
        for file in dict.fromkeys(self._places[prompt, role][0] for prompt in wanted if (prompt, role) in self._places):
            if file not in self._verified and time.monotonic() < deadline and not self._is_sound(file):
                self._drop(file)
        return [prompt for prompt in wanted if (prompt, role) not in self._places]

    def outdated(self) -> list[str]:
        """If the store is empty, other folders with embeddings of an earlier version of the program."""
        names = [] if self._places else [name for name in self._directory.names() if FINGERPRINT.fullmatch(name)]
        parts = [(name, next(self._parts(self._directory / name), None)) for name in names if name != self._key]
        return [name for name, part in parts if part and _is_outdated(self._directory / name, part)]

    def add(self, embeddings: list[PromptEmbedding], role: Role = "prompt") -> None:
        """Stores embeddings in a new part. After a kill, a part is complete or does not exist."""
        file = f"part-{uuid.uuid4().hex}.parquet"
        table = pa.Table.from_pylist([_to_row(embedding, role) for embedding in embeddings], schema=SCHEMA)
        content = pa.BufferOutputStream()
        # no compression or dictionary, because the bits of a network's output hardly repeat
        pq.write_table(table, content, row_group_size=1, compression="none", use_dictionary=False)
        self._folder.write(file, content.getvalue())
        self._note(file, [(embedding.prompt, role) for embedding in embeddings])

    def get(self, prompts: Sequence[str], negative: str | None = None) -> list[PromptEmbedding]:
        """The embeddings of stored prompts, bit for bit as added, each with that of the negative prompt.

        Raises:
            DamagedPart: one line; encode its prompts again.
        """
        found = {away: self._read(away, "negative") for away in negative_prompts(negative, prompts)}
        return [replace(self._read(p, "prompt"), negative=found.get(f"{negative}{sources_of(p)}")) for p in prompts]

    def _read(self, prompt: str, role: Role) -> PromptEmbedding:
        file, row = self._places[prompt, role]
        return self._read_part(file, lambda part: _from_row(part.read_row_group(row), prompt, role))

    def _read_part(self, file: str, read: Callable[[pq.ParquetFile], T]) -> T:
        """The result of `read` on a part. If it fails, the part is verified, to tell damage from storage errors."""
        try:
            with self._folder.open(file) as content:
                return read(pq.ParquetFile(content))
        except UNREADABLE as error:
            if self._is_sound(file):
                raise
            self._drop(file)
            raise DamagedPart(
                f"data.embeddings: {self._folder / file} was damaged and is deleted ({' '.join(str(error).split())}); "
                "run the same command: it encodes these prompts again and resumes"
            ) from None

    def _is_sound(self, file: str) -> bool:
        """True if every row of a part can be read. OSError if its bytes cannot be read."""
        content = self._folder.read(file)
        try:
            part = pq.ParquetFile(pa.BufferReader(content))
            for row, key in enumerate(_keys(part)):
                _from_row(part.read_row_group(row), *key)
        except UNREADABLE:
            return False
        self._verified.add(file)
        return True

    def _drop(self, file: str) -> None:
        if self._read_only:
            raise DamagedPart(f"data.embeddings: {self._folder / file} is damaged")
        logger.warning(
            "data.embeddings: %s was damaged and is deleted; its prompts are encoded again", self._folder / file
        )
        self._folder.delete(file)
        self.damaged.append(file)
        self._places = {key: place for key, place in self._places.items() if place[0] != file}

    @staticmethod
    def _parts(folder: Folder) -> Iterator[str]:
        return (file for file in folder.names() if PART_NAME.fullmatch(file))

    def _note(self, file: str, rows: Sequence[tuple[str, str]]) -> None:
        self._places.update({key: (file, row) for row, key in enumerate(rows)})


def negative_prompts(negative: str | None, prompts: Sequence[str]) -> list[str]:
    """The negative prompts of prompts, each once: the negative prompt, if any, with the sources of the prompt."""
    return [] if negative is None else list(dict.fromkeys(f"{negative}{sources_of(prompt)}" for prompt in prompts))


def encode_missing(
    store: EmbeddingStore,
    missing: Sequence[str],
    encode: Callable[[Sequence[str]], list[PromptEmbedding]],
    role: Role = "prompt",
) -> Iterator[tuple[int, float]]:
    """Encodes and stores prompts part by part; yields (prompts done, seconds since the start) after each part.

    Each part is saved when it is complete, so that a killed process resumes with the missing prompts.
    """
    start, done = time.perf_counter(), 0
    while done < len(missing):
        part = missing[done : done + (PART if done else FIRST_PART)]
        store.add(encode(part), role)
        done += len(part)
        yield done, time.perf_counter() - start


def _keys(part: pq.ParquetFile) -> list[tuple[str, str]]:
    """Prompt and role of each row."""
    rows = part.read(columns=["prompt", "role"])
    return list(zip(rows["prompt"].to_pylist(), rows["role"].to_pylist(), strict=True))


def _is_outdated(folder: Folder, file: str) -> bool:
    try:
        return "role" not in pq.ParquetFile(folder.open(file)).schema_arrow.names
    except (OSError, pa.ArrowInvalid):  # damaged, and nothing that is needed
        return False


def _to_row(embedding: PromptEmbedding, role: Role) -> dict[str, Any]:
    tensors = [
        {
            "name": name,
            "dtype": tensor.dtype,
            "shape": tensor.data.shape,
            "data": tensor.data.astype(STORED_AS[tensor.dtype], casting="equiv").tobytes(),
        }
        for name, tensor in embedding.tensors.items()
    ]
    row = {"prompt": embedding.prompt, "role": role, "tensors": tensors}
    return {**row, "sha256": _digest(row)}


def _digest(row: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(f"{row['prompt']}\0{row['role']}\0".encode())
    for part in row["tensors"]:
        digest.update(f"{part['name']}\0{part['dtype']}\0{list(part['shape'])}\0".encode())
        digest.update(part["data"])
    return digest.digest()


def _from_row(table: pa.Table, prompt: str, role: str) -> PromptEmbedding:
    """The embedding in a row of this prompt and role. ValueError if the row has changed."""
    (row,) = table.to_pylist()
    if (row["prompt"], row["role"]) != (prompt, role) or row.get("sha256") not in (None, _digest(row)):
        raise ValueError("a row has another checksum than when it was written")
    tensors = {
        part["name"]: StoredTensor(
            part["dtype"], np.frombuffer(part["data"], STORED_AS[part["dtype"]]).reshape(part["shape"])
        )
        for part in row["tensors"]
    }
    return PromptEmbedding(row["prompt"], tensors)
