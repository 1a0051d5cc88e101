"""Prompts' embeddings in Parquet, encoded once and shared between runs of the same model.

Layout: `<directory>/<fingerprint>/part-<unique>.parquet`. A row is one prompt, and a row group of its own, so that
reading one prompt (4 MB for FLUX) reads nothing else. Columns: prompt (string), dtype (string: what the bits mean),
pooled and sequence (binary, little-endian), sequence_length (S; D_text follows from the size).
"""

import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.files import resolve
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import PromptEmbedding

PART = 64  # prompts a Parquet file: what a kill in the middle loses at most
PART_NAME = re.compile(r"part-\w+\.parquet")
FIRST_PART = 8  # soon done, and long enough to tell how long all will take
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
STORED_AS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<i2"),
    "float16": np.dtype("<f2"),
}
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "dtype": pa.string(),
        "pooled": pa.binary(),
        "sequence": pa.binary(),
        "sequence_length": pa.int32(),
    }
)


def fingerprint(config: ModelConfig) -> str:
    """SHA-256 of all that decides an embedding: encoders, tokenizers, dtype, length.

    A local pipeline counts by the content of its files, so that it may move and may not change; one on the hub by its
    id and revision.
    """
    digest = hashlib.sha256(f"{config.dtype}\0{config.max_sequence_length}\0".encode())
    root = Path(resolve(config.path))
    if not root.is_dir():
        digest.update(f"{config.path}\0{config.revision}".encode())
        return digest.hexdigest()
    for file in sorted(file for folder in ENCODER_FOLDERS for file in (root / folder).rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()


class EmbeddingStore:
    """The embeddings under one fingerprint. Sees what was there when it was opened, and what it adds itself.

    Any number of processes may add at once: parts have unique names, and of a prompt in two of them either will do.
    """

    def __init__(self, directory: str | Path, fingerprint: str) -> None:
        self._folder = Folder(directory) / fingerprint
        self._places: dict[str, tuple[str, int]] = {}  # prompt -> file, row
        for file in self._folder.names():
            if PART_NAME.fullmatch(file):
                self._note(file, self._open(file).read(columns=["prompt"])["prompt"].to_pylist())

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of `prompts` that are not stored, in order, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._places]

    def add(self, embeddings: list[PromptEmbedding]) -> None:
        """Store embeddings in a part of their own, which is there whole or, after a kill, not at all."""
        file = f"part-{uuid.uuid4().hex}.parquet"
        table = pa.Table.from_pylist([_to_row(embedding) for embedding in embeddings], schema=SCHEMA)
        content = pa.BufferOutputStream()
        # neither compression nor a dictionary: the bits of a network's output repeat too little
        pq.write_table(table, content, row_group_size=1, compression="none", use_dictionary=False)
        self._folder.write(file, content.getvalue())
        self._note(file, [embedding.prompt for embedding in embeddings])

    def get(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        """The embeddings of prompts that are stored, bit for bit as they were added."""
        return [_from_row(self._open(file).read_row_group(row)) for file, row in (self._places[p] for p in prompts)]

    def _open(self, file: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._folder.open(file))
        except (OSError, pa.ArrowInvalid) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data.embeddings: cannot read {self._folder / file}; delete it to encode its prompts anew ({reason})"
            ) from None

    def _note(self, file: str, prompts: Sequence[str]) -> None:
        self._places.update({prompt: (file, row) for row, prompt in enumerate(prompts)})


def embedding_shape(config: ModelConfig) -> tuple[int, int, int]:
    """(S, D_text, D_pooled) of this model's embeddings, from the configuration of its transformer alone."""
    from diffusers import FluxTransformer2DModel  # heavy, and not needed to read what is stored

    path, revision = resolve(config.path), config.revision
    network = FluxTransformer2DModel.load_config(path, subfolder="transformer", revision=revision)
    return config.max_sequence_length, network["joint_attention_dim"], network["pooled_projection_dim"]


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


def _to_row(embedding: PromptEmbedding) -> dict[str, Any]:
    stored_as = STORED_AS[embedding.dtype]
    return {
        "prompt": embedding.prompt,
        "dtype": embedding.dtype,
        "pooled": embedding.pooled.astype(stored_as, casting="equiv").tobytes(),
        "sequence": embedding.sequence.astype(stored_as, casting="equiv").tobytes(),
        "sequence_length": len(embedding.sequence),
    }


def _from_row(table: pa.Table) -> PromptEmbedding:
    (row,) = table.to_pylist()
    stored_as = STORED_AS[row["dtype"]]
    pooled: NDArray[Any] = np.frombuffer(row["pooled"], stored_as)
    sequence: NDArray[Any] = np.frombuffer(row["sequence"], stored_as).reshape(row["sequence_length"], -1)
    return PromptEmbedding(row["prompt"], pooled, sequence, row["dtype"])
