"""Prompts: read from files of several formats, and drawn in an order that the seed and the iteration decide."""

import glob
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from g2rpo_ray.files import resolve
from g2rpo_ray.types import Metadata
from g2rpo_ray.words import one_line, shown

KEYS = ("prompt", "caption", "text")
"""What a prompt is called in an object or a column; the first of them that is there counts."""
METADATA = "metadata"
GENEVAL = ("include", "exclude", "vqa_list", "tag")
"""Fields of the prompt files of GenEval and GenEval 2: an object with one of the first three is its own metadata."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a run trains on and is judged by."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    dropped: int  # training prompts that are held out too, and not trained on
    metadata: Mapping[str, Metadata] = field(default_factory=dict)  # by prompt, of those that have any


def read_prompts(path: str, key: str) -> tuple[str, ...]:
    """The prompts of `read_records`, without their metadata."""
    return tuple(read_records(path, key))


def read_records(path: str, key: str) -> dict[str, Metadata]:
    """The prompts of a file, stripped, in order, with their metadata; blank ones and repetitions are left out.

    The ending decides the format: `.jsonl` an object or a string a line, `.json` one list of objects or strings (as
    HPDv2 publishes both), `.parquet` a column, any other text with a prompt a line. KEYS says what is read of an object
    or a table; `FILE#NAME` says otherwise. Metadata is its field `metadata`, an object or the JSON text of one, or the
    fields GENEVAL. A pattern such as `benchmark/*.json` stands for all files that match, in
    alphabetical order. `key` is the configuration key that names the file.

    Raises:
        ValueError: one line that names the key, the file and what to do.
    """
    found, keys = _files(path)
    records: dict[str, Metadata] = {}
    for text, metadata in (record for file in found for record in _read(file, keys, key)):
        prompt = text.strip()
        if records.setdefault(prompt, metadata) != metadata:
            raise ValueError(
                f"{key}: {path} has the prompt {shown(prompt)} twice, with different metadata; rewards know a prompt "
                f"by its text: keep one, or rename the field {METADATA} if no reward reads it"
            )
    records.pop("", None)
    if not records:
        raise ValueError(f"{key}: {path} holds no prompt; write one a line")
    return records


def _files(path: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files that a path or pattern stands for, and what a prompt is called in them."""
    name, separator, chosen = path.rpartition("#")
    if not separator or Path(resolve(path)).exists():
        name, chosen = path, ""
    file = Path(resolve(name))
    matching = [] if file.exists() else sorted(glob.glob(str(file)))
    return [Path(match) for match in matching] or [file], (chosen,) if chosen else KEYS


def _read(file: Path, keys: tuple[str, ...], key: str) -> Iterator[tuple[str, Metadata]]:
    try:
        if file.suffix == ".parquet":
            yield from _column(file, keys)
            return
        text = file.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        if file.suffix == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            yield from (_record(_json(line, at), keys, f"line {at}") for at, line in lines if line.strip())
        elif file.suffix == ".json":
            entries = _json(text)
            if not isinstance(entries, list):
                raise ValueError(f"it holds one {type(entries).__name__}")
            yield from (_record(entry, keys, f"entry {at}") for at, entry in enumerate(entries, 1))
        else:
            yield from ((line, {}) for line in text.split("\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {file} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise ValueError(
            f"{key}: cannot read {file} ({reason}); give a text file, a prompt a line, or .jsonl, .json or .parquet"
        ) from None
    except (ValueError, pa.ArrowInvalid) as error:
        reason = one_line(error)
        expected = {".parquet": "a string column", ".jsonl": "an object a line", ".json": "a list of objects"}
        wanted = f"{expected.get(file.suffix)} with the prompt as {' or '.join(keys)}"
        raise ValueError(f"{key}: {file}: {reason}; expected {wanted}: another name is given as FILE#NAME") from None


def _json(text: str, line: int = 0) -> Any:
    """The value in a JSON text, which is the file or that line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line or error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"line {line} is nested too deep" if line else "it is nested too deep") from None


def _record(entry: Any, keys: tuple[str, ...], place: str) -> tuple[str, Metadata]:
    """One entry of a JSON file: a string, or an object that has the prompt; null counts as blank."""
    found = entry
    if isinstance(entry, dict):
        name = next((name for name in keys if name in entry), None)
        if name is None:
            raise ValueError(f"{place} has no {' or '.join(keys)}, only {', '.join(entry) or 'nothing'}")
        found = entry[name] if entry[name] is not None else ""
    if not isinstance(found, str):
        raise ValueError(f"{place} is {shown(found)}, not text")
    return found, _metadata(entry, place) if isinstance(entry, dict) else {}


def _metadata(entry: Mapping[str, Any], place: str) -> Metadata:
    """What an object or a row says of its prompt; what is null is not there."""
    own = entry.get(METADATA)
    if own is None and all(entry.get(name) is None for name in GENEVAL[:3]):
        return {}
    found = _parsed({name: entry.get(name) for name in GENEVAL} if own is None else own, place)
    if not isinstance(found, dict):
        raise ValueError(f"{place} has {METADATA} {shown(own)}, not an object or the JSON text of one")
    return found


def _parsed(value: Any, place: str) -> Any:
    """A value without nulls, which Parquet's structures are full of; JSON text, as some columns have it, is read."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return _parsed(json.loads(value), place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place} has metadata that is no JSON: {one_line(error)}") from None
    if isinstance(value, dict):
        return {name: _parsed(part, place) for name, part in value.items() if part is not None}
    return [_parsed(part, place) for part in value] if isinstance(value, list) else value


def _column(file: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, Metadata]]:
    """The records of a Parquet file, which is read in parts: beside them it may hold pictures."""
    table = pq.ParquetFile(file)
    name = next((name for name in keys if name in table.schema_arrow.names), None)
    if name is None:
        raise ValueError(f"its columns are {', '.join(table.schema_arrow.names)}")
    kind = table.schema_arrow.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"column {name} holds {kind}, not text")
    wanted = [name, *(other for other in (METADATA, *GENEVAL) if other in table.schema_arrow.names and other != name)]
    rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
    yield from ((row[name] or "", _metadata(row, f"row {at}")) for at, row in enumerate(rows, 1))


def without_heldout(train: Sequence[str], heldout: Sequence[str]) -> tuple[str, ...]:
    """The training prompts that are no held-out ones, whatever their capitals and spaces.

    They are dropped from training, and not from what is held out: a comparison must mean the same for every run, and a
    prompt that was trained on would flatter this one.
    """
    held = {_alike(prompt) for prompt in heldout}
    return tuple(prompt for prompt in train if _alike(prompt) not in held)


def _alike(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def iteration_prompts(prompts: Sequence[str], per_iteration: int, seed: int, iteration: int) -> tuple[str, ...]:
    """The prompts of one iteration, counted from 0: no two the same.

    Each epoch has an order of its own and len(prompts) // per_iteration whole iterations; the prompts left over wait
    for another epoch, as with a data loader that drops its last batch. `prompts` holds none twice.

    Raises:
        ValueError: there are fewer prompts than an iteration needs.
    """
    if per_iteration > len(prompts):
        raise ValueError(
            f"data.prompts_per_iteration: {per_iteration} given, but there are {len(prompts)} prompts; "
            "lower it or add lines to data.train_prompts"
        )
    epoch, place = divmod(iteration, len(prompts) // per_iteration)
    return _epoch_order(prompts, seed, epoch)[place * per_iteration : (place + 1) * per_iteration]


def drawn_prompts(prompts: Sequence[str], per_iteration: int, seed: int, iterations: int) -> tuple[str, ...]:
    """The prompts that `iterations` iterations from the first draw, each once, in the order of their first use.

    A run over a big file uses few of its prompts, and an embedding takes megabytes: these alone need encoding.
    """
    an_epoch = len(prompts) // per_iteration
    drawn: dict[str, None] = {}
    for epoch, first in enumerate(range(0, iterations, an_epoch)):
        used = min(an_epoch, iterations - first) * per_iteration
        drawn.update(dict.fromkeys(_epoch_order(prompts, seed, epoch)[:used]))
        if len(drawn) == len(prompts):
            break
    return tuple(drawn)


def _epoch_order(prompts: Sequence[str], seed: int, epoch: int) -> tuple[str, ...]:
    order = list(prompts)
    random.Random(f"{seed}/{epoch}").shuffle(order)  # seeded by a string: the same on every platform
    return tuple(order)
