"""Reads prompts and their metadata from files of several formats."""

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from g2rpo_ray.data.pictures import NAMES, pictures_in, with_sources
from g2rpo_ray.messages import one_line, shown
from g2rpo_ray.paths import local_path
from g2rpo_ray.types import Metadata, sources_in, sources_of

KEYS = ("prompt", "caption", "text")
"""Names of the prompt in an object or a table; the first one that is there is used."""
EDIT_KEYS = (*KEYS, "instruction", "edit_instruction")
"""The same where prompts may have sources."""
METADATA = "metadata"
GENEVAL = ("include", "exclude", "vqa_list", "tag")
"""Fields of the prompt files of GenEval and GenEval 2: an object with one of the first three is its own metadata."""
OBJECT = re.compile(r'\s*(\[\s*)?\{\s*("|$)')
"""The beginning of a line of JSON with an object."""

Keys = tuple[str, ...]
PromptRecord = tuple[str, str, Mapping[str, Any]]
"""Place in the file, for messages; text of the prompt; the object or row that it stands in, if it does."""
ROWS_AT_ONCE = 64  # of a table with pictures


class Unusable(ValueError):
    """A reason that says by itself what to do about the file."""


Source = str | Sequence[str | Mapping[str, Any]]
"""A file, or prompts as the lines of a .jsonl file hold them."""


def read_prompts(source: Source, key: str) -> tuple[str, ...]:
    """The prompts of `read_records`, without their metadata."""
    return tuple(read_records(source, key))


def read_records(source: Source, key: str, sources: int = 0) -> dict[str, Metadata]:
    """The prompts of a file or a list, stripped, in order, with their metadata, without blank ones and repetitions.

    The ending, in any case, decides the format: `.jsonl` and `.ndjson` have an object or a string a line, `.json` has
    one list of objects or strings (as HPDv2 publishes both), `.csv`, `.tsv` and `.parquet` have a column, any other
    text has a prompt a line. Each may be compressed: `.gz` follows the ending. KEYS are the names of the prompt in an
    object or a table; `FILE#NAME` gives another. Metadata is the field `metadata`, an object or the JSON text of one,
    or the fields GENEVAL. A pattern such as `benchmark/*.json` stands for all files that match, in alphabetical order.

    Args:
        source: file, pattern or list.
        key: the configuration key that names it, for messages.
        sources: source pictures that a prompt may have. With any, the pictures `data.pictures.NAMES` beside a prompt
            are part of its metadata, and the sources of the prompt: the same text with two sources is two prompts.

    Raises:
        ValueError: one line that names the key, the file and what to do.
    """
    records: dict[str, Metadata] = {}
    where = source if isinstance(source, str) else "the list"
    found = _from_files(source, key, sources) if isinstance(source, str) else _from_list(source, key, sources)
    for text, metadata in found:
        prompt = with_sources(text.strip(), sources_in(metadata)) if sources and text.strip() else text.strip()
        if records.setdefault(prompt, metadata) != metadata:
            raise ValueError(
                f"{key}: {where} has the prompt {shown(prompt)} twice, with different metadata; rewards know a prompt "
                f"by its text: keep one, or rename the field {METADATA} if no reward reads it"
            )
    records.pop("", None)
    if not records:
        raise ValueError(f"{key}: {where} holds no prompt; write one a line")
    return records


def _from_files(path: str, key: str, sources: int) -> Iterator[tuple[str, Metadata]]:
    try:
        found, keys = _files(path, EDIT_KEYS if sources else KEYS)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return (record for file in found for record in _read(file, keys, key, sources))


def _from_list(entries: Sequence[str | Mapping[str, Any]], key: str, sources: int) -> Iterator[tuple[str, Metadata]]:
    keys = EDIT_KEYS if sources else KEYS
    try:
        for at, entry in enumerate(entries, 1):
            yield _told(*_record(entry, keys, f"entry {at}"), Path(), sources)
    except ValueError as error:
        raise ValueError(f"{key}: {one_line(error)}; give texts, or objects with {' or '.join(keys)}") from None


def _files(path: str, keys: Keys) -> tuple[list[Path], Keys]:
    """The files that a path or pattern stands for, and the names of the prompt in them."""
    name, separator, chosen = path.rpartition("#")
    if not separator or local_path(path).exists():
        name, chosen = path, ""
    file = local_path(name)
    matching = [] if file.exists() else sorted(glob.glob(str(file)))
    return [Path(match) for match in matching] or [file], (chosen,) if chosen else keys


def _read(file: Path, keys: Keys, key: str, sources: int) -> Iterator[tuple[str, Metadata]]:
    try:
        for record in _rows(file, keys, with_pictures=sources > 0):
            yield _told(*record, file.parent, sources)
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {file} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except Unusable as error:
        raise ValueError(f"{key}: {file}: {error}") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{key}: {file} cannot be decompressed ({one_line(error)}); compress it with gzip") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise ValueError(
            f"{key}: cannot read {file} ({reason}); give a text file, a prompt a line, or "
            f"{', '.join([*READERS])} or {PARQUET}"
        ) from None
    except (ValueError, pa.ArrowException) as error:
        _, expected = READERS.get(_ending(file), (None, "a string column"))
        wanted = f"{expected} with the prompt as {' or '.join(keys)}"
        raise ValueError(
            f"{key}: {file}: {one_line(error)}; expected {wanted}: another name is given as FILE#NAME"
        ) from None


def _told(place: str, text: str, entry: Mapping[str, Any], folder: Path, sources: int) -> tuple[str, Metadata]:
    """The text of a prompt, and what stands beside it."""
    metadata = _metadata(entry, place)
    _check_characters(place, text, metadata)
    if not sources:
        return text, metadata
    try:
        pictures = pictures_in(entry, folder)
    except ValueError as error:
        raise Unusable(f"{place}: {error}") from None
    if len(pictures.get("source", ())) > sources:
        raise Unusable(f"{place} has {len(pictures['source'])} sources; model.sources={sources} are read")
    return text, {**metadata, **pictures}


def _ending(file: Path) -> str:
    """The ending that decides the format, in small letters."""
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def _rows(file: Path, keys: Keys, with_pictures: bool) -> Iterator[PromptRecord]:
    ending = _ending(file)
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
        if ending == PARQUET:
            yield from _column(stream, keys, with_pictures)
            return
        text = stream.read().decode("utf-8-sig")  # with or without a byte order mark
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise Unusable(f"line {line} holds a NUL byte, so it is UTF-16 or no text; save it as UTF-8")
    read, _ = READERS.get(ending, (_plain, ""))
    yield from read(text, keys)


def _check_characters(place: str, text: str, metadata: Metadata) -> None:
    """Raise Unusable for characters that cannot be encoded later, far from the file."""
    whole = text + (json.dumps(metadata, ensure_ascii=False) if metadata else "")
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(whole[error.start]):04x}"
        raise Unusable(f"{place} holds {half}, half of a surrogate pair; write the character itself") from None
    if "\0" in text:
        raise Unusable(f"{place} holds a NUL character; delete it")
    if sources_of(text.strip()):
        raise Unusable(f"{place} ends as a prompt with sources does, {sources_of(text.strip())}; give the text alone")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(re.split("\r\n|\r|\n", text), 1)


def _plain(text: str, keys: Keys) -> Iterator[PromptRecord]:
    """A prompt a line, where nothing shows that the file has another format."""
    if len(keys) == 1:
        raise Unusable(
            f"#{keys[0]} names a column, and a text file has none; leave it out, or give the file the ending of its "
            f"format: {', '.join(READERS)} or {PARQUET}"
        )
    for number, line in _lines(text):
        if OBJECT.match(line):
            raise Unusable(
                f"line {number} looks like JSON, not like a prompt; give the file the ending .jsonl if it has an "
                "object a line, .json if it has one list"
            )
        yield f"line {number}", line, {}


def _json_lines(text: str, keys: Keys) -> Iterator[PromptRecord]:
    for number, line in _lines(text):
        if line.strip():
            yield _record(_json(line, number), keys, f"line {number}")


def _json_list(text: str, keys: Keys) -> Iterator[PromptRecord]:
    entries = _json(text)
    if not isinstance(entries, list):
        raise ValueError(f"it holds one {type(entries).__name__}")
    yield from (_record(entry, keys, f"entry {at}") for at, entry in enumerate(entries, 1))


def _json(text: str, line: int = 0) -> Any:
    """The value in a JSON text, which is the file or that line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line or error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"line {line} is nested too deep" if line else "it is nested too deep") from None


def _record(entry: Any, keys: Keys, place: str) -> PromptRecord:
    """One entry of a JSON file: a string, or an object that has the prompt; null counts as blank."""
    found = entry
    if isinstance(entry, dict):
        name = next((name for name in keys if name in entry), None)
        if name is None:
            raise ValueError(f"{place} has no {' or '.join(keys)}, only {', '.join(entry) or 'nothing'}")
        found = entry[name] if entry[name] is not None else ""
    if not isinstance(found, str):
        raise ValueError(f"{place} is {shown(found)}, not text")
    return place, found, entry if isinstance(entry, dict) else {}


def _metadata(entry: Mapping[str, Any], place: str) -> Metadata:
    """The metadata in an object or a row; null counts as missing."""
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


def _comma_separated(text: str, keys: Keys) -> Iterator[PromptRecord]:
    return _table(text, keys, ",")


def _tab_separated(text: str, keys: Keys) -> Iterator[PromptRecord]:
    return _table(text, keys, "\t")


def _table(text: str, keys: Keys, delimiter: str) -> Iterator[PromptRecord]:
    """The records of a CSV or TSV text, whose first line names the columns. An empty field counts as missing."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        name = _choose(names, keys)
        for row in filter(None, rows):
            place = f"line {rows.line_num}"
            if len(row) != len(names):
                raise Unusable(
                    f"{place} has {len(row)} fields, but the first line has {len(names)}; put a text with "
                    f"{delimiter!r} in double quotes"
                )
            entry = {column: field or None for column, field in zip(names, row, strict=True)}
            yield place, entry[name] or "", entry
    except csv.Error as error:
        reason = f"line {rows.line_num}: {one_line(error)}"
        raise Unusable(f"{reason}; put a text with a double quote in double quotes, and write that one twice") from None


def _choose(names: Sequence[str], keys: Keys) -> str:
    """The column of the prompt, which must be one, as those of metadata."""
    name = next((name for name in keys if name in names), None)
    if name is None:
        raise ValueError(f"its columns are {', '.join(names)}" if any(names) else "it has no column")
    for wanted in (name, METADATA, *GENEVAL):
        if names.count(wanted) > 1:
            raise ValueError(f"{names.count(wanted)} of its columns are called {wanted}; rename the others")
    return name


def _column(stream: BinaryIO | gzip.GzipFile, keys: Keys, with_pictures: bool) -> Iterator[PromptRecord]:
    """The records of a Parquet file, read in parts, since it may hold pictures beside them."""
    table = pq.ParquetFile(stream)
    names = table.schema_arrow.names
    name = _choose(names, keys)
    kind = table.schema_arrow.field(name).type
    if not _is_text(kind):
        raise ValueError(f"column {name} holds {kind}, not text")
    pictures = [other for kind in NAMES.values() for other in kind] if with_pictures else []
    wanted = [name, *(other for other in (METADATA, *GENEVAL, *pictures) if other in names and other != name)]
    size = {"batch_size": ROWS_AT_ONCE} if with_pictures else {}
    rows = (row for batch in table.iter_batches(columns=wanted, **size) for row in batch.to_pylist())
    yield from ((f"row {at}", row[name] or "", row) for at, row in enumerate(rows, 1))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # as pandas writes a categorical column
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


PARQUET = ".parquet"
READERS: dict[str, tuple[Callable[[str, Keys], Iterator[PromptRecord]], str]] = {
    ".jsonl": (_json_lines, "an object a line"),
    ".ndjson": (_json_lines, "an object a line"),
    ".json": (_json_list, "a list of objects"),
    ".csv": (_comma_separated, "a column"),
    ".tsv": (_tab_separated, "a column"),
}
"""By ending, the reader of a text and what it expects."""
