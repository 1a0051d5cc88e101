"""Prompts' embeddings in Parquet, encoded once and shared between runs of the same model.

Layout: `<directory>/<fingerprint>/part-<unique>.parquet`. A row is one prompt in one role, and a row group of its own,
so that reading one prompt (4 MB for FLUX) reads nothing else. Its tensors have the names of the pipeline's arguments.
"""

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.files import resolve
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import PromptEmbedding, StoredTensor

Role = Literal["prompt", "negative"]

LAYOUT = 2
PART = 64  # prompts a Parquet file: what a kill in the middle loses at most
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
PART_NAME = re.compile(r"part-\w+\.parquet")
FIRST_PART = 8  # soon done, and long enough to tell how long all will take
NOT_ENCODING = ("transformer", "vae", "scheduler")  # parts of a pipeline
STORED_AS: dict[str, np.dtype[Any]] = {
    name: np.dtype(stored)
    for name, stored in {
        "float32": "<f4", "bfloat16": "<i2", "float16": "<f2", "int64": "<i8", "int32": "<i4", "bool": "?",
    }.items()
}  # fmt: skip
TENSOR = {"name": pa.string(), "dtype": pa.string(), "shape": pa.list_(pa.int32()), "data": pa.binary()}
SCHEMA = pa.schema({"prompt": pa.string(), "role": pa.string(), "tensors": pa.list_(pa.struct(list(TENSOR.items())))})


def fingerprint(config: ModelConfig) -> str:
    """SHA-256 of all that decides an embedding: encoders, tokenizers, pipeline, dtype, length, templates in diffusers.

    A local pipeline counts by the content of its files, so that it may move and may not change; one on the hub by its
    id and revision.
    """
    version = metadata.version("diffusers").rpartition(".")[0]  # importing it takes seconds
    digest = hashlib.sha256(f"{LAYOUT}\0{version}\0{config.dtype}\0{config.max_sequence_length}\0".encode())
    root = Path(resolve(config.path))
    if not root.is_dir():
        digest.update(f"{config.path}\0{config.revision}".encode())
        return digest.hexdigest()
    index = root / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {}
    digest.update(f"{parts.get('_class_name')}\0".encode())
    folders = sorted(part for part, value in parts.items() if isinstance(value, list) and part not in NOT_ENCODING)
    for file in sorted(file for folder in folders for file in (root / folder).rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()


class EmbeddingStore:
    """The embeddings under one fingerprint. Sees what was there when it was opened, and what it adds itself.

    Any number of processes may add at once: parts have unique names, and of a prompt in two of them either will do.
    """

    def __init__(self, directory: str | Path, fingerprint: str) -> None:
        self._directory, self._key = Folder(directory), fingerprint
        self._folder = self._directory / fingerprint
        self._places: dict[tuple[str, str], tuple[str, int]] = {}  # prompt, role -> file, row
        for file in self._parts(self._folder):
            rows = _open(self._folder, file).read(columns=["prompt", "role"])
            self._note(file, list(zip(rows["prompt"].to_pylist(), rows["role"].to_pylist(), strict=True)))

    def missing(self, prompts: Sequence[str], role: Role = "prompt") -> list[str]:
        """Those of `prompts` that are not stored, in order, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if (prompt, role) not in self._places]

    def outdated(self) -> list[str]:
        """Folders beside this one, where it has nothing, whose embeddings an earlier version of the program wrote."""
        names = [] if self._places else [name for name in self._directory.names() if FINGERPRINT.fullmatch(name)]
        parts = [(name, next(self._parts(self._directory / name), None)) for name in names if name != self._key]
        return [n for n, part in parts if part and "role" not in _open(self._directory / n, part).schema_arrow.names]

    def add(self, embeddings: list[PromptEmbedding], role: Role = "prompt") -> None:
        """Store embeddings in a part of their own, which is there whole or, after a kill, not at all."""
        file = f"part-{uuid.uuid4().hex}.parquet"
        table = pa.Table.from_pylist([_to_row(embedding, role) for embedding in embeddings], schema=SCHEMA)
        content = pa.BufferOutputStream()
        # neither compression nor a dictionary: the bits of a network's output repeat too little
        pq.write_table(table, content, row_group_size=1, compression="none", use_dictionary=False)
        self._folder.write(file, content.getvalue())
        self._note(file, [(embedding.prompt, role) for embedding in embeddings])

    def get(self, prompts: Sequence[str], negative: str | None = None) -> list[PromptEmbedding]:
        """The embeddings of prompts that are stored, bit for bit as they were added, each with that of `negative`."""
        found = None if negative is None else self._read(negative, "negative")
        return [replace(self._read(prompt, "prompt"), negative=found) for prompt in prompts]

    def _read(self, prompt: str, role: Role) -> PromptEmbedding:
        file, row = self._places[prompt, role]
        return _from_row(_open(self._folder, file).read_row_group(row))

    @staticmethod
    def _parts(folder: Folder) -> Iterator[str]:
        return (file for file in folder.names() if PART_NAME.fullmatch(file))

    def _note(self, file: str, rows: Sequence[tuple[str, str]]) -> None:
        self._places.update({key: (file, row) for row, key in enumerate(rows)})


def encode_missing(
    store: EmbeddingStore, missing: Sequence[str], encode: Callable[[Sequence[str]], list[PromptEmbedding]]
) -> Iterator[tuple[int, float]]:
    """Encode and store prompts part by part; after each part (prompts done, seconds since the start).

    A part is kept as soon as it is whole: who is killed goes on with what the store then misses.
    """
    start, done = time.perf_counter(), 0
    while done < len(missing):
        part = missing[done : done + (PART if done else FIRST_PART)]
        store.add(encode(part))
        done += len(part)
        yield done, time.perf_counter() - start


def _open(folder: Folder, file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(folder.open(file))
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data.embeddings: cannot read {folder / file}; delete it to encode its prompts anew ({reason})"
        ) from None


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
    return {"prompt": embedding.prompt, "role": role, "tensors": tensors}


def _from_row(table: pa.Table) -> PromptEmbedding:
    (row,) = table.to_pylist()
    tensors = {
        part["name"]: StoredTensor(
            part["dtype"], np.frombuffer(part["data"], STORED_AS[part["dtype"]]).reshape(part["shape"])
        )
        for part in row["tensors"]
    }
    return PromptEmbedding(row["prompt"], tensors)
