"""Prompts that are given in Python, as settings hold them: texts, and pictures as data URIs."""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

PROMPT_COLUMNS = (
    *("prompt", "caption", "text", "instruction", "edit_instruction", "metadata"),
    *("include", "exclude", "vqa_list", "tag"),
)
"""Of a table of prompts: see `data.records`."""
PICTURE_COLUMNS = (
    *("source", "source_image", "input_image"),
    *("target", "target_image", "output_image", "edited_image", "mask"),
)
"""The same, with pictures: see `data.pictures`."""
MAX_PICTURE_BYTES = 16 * 2**20  # of all pictures of a list: settings are written to files and sent to every process


def listed(prompts: Any) -> Any:
    """A path as text, a `datasets.Dataset` as its rows; in a list, pictures as data URIs.

    A picture is bytes, a PIL image, a numpy array uint8 [H, W, 3], or an object with `bytes` or `path`.

    Raises:
        ValueError: one line; an entry holds what cannot be written down, or pictures of more than MAX_PICTURE_BYTES.
    """
    if isinstance(prompts, os.PathLike):
        return os.fspath(prompts)
    if isinstance(getattr(prompts, "column_names", None), list):
        prompts = _rows(prompts)
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        return prompts
    found, size = [], 0
    for at, entry in enumerate(prompts, 1):
        found.append(_as_text(entry, f"entry {at}") if isinstance(entry, Mapping) else entry)
        size += _picture_bytes(found[-1]) if isinstance(entry, Mapping) else 0
        if size > MAX_PICTURE_BYTES:
            raise ValueError(
                f"pictures: more than {MAX_PICTURE_BYTES >> 20} MiB given, and every process gets the settings; give "
                "paths, or a Parquet file (`Dataset.to_parquet`)"
            )
    return tuple(found)


def _rows(table: Any) -> list[Any]:
    """Of a `datasets.Dataset`, whose pictures are taken as they are in its files: decoded ones are other bytes."""
    known = (*PROMPT_COLUMNS, *PICTURE_COLUMNS)
    table = table.select_columns([name for name in table.column_names if name in known])
    for name, feature in dict(getattr(table, "features", None) or {}).items():
        if getattr(feature, "decode", False):
            table = table.cast_column(name, type(feature)(decode=False))
    return list(table)


def _as_text(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """An object that JSON can hold. Other fields than those that are read are left out if they cannot be written."""
    found = {}
    for name, value in entry.items():
        given = _picture(value) if name in PICTURE_COLUMNS else value
        try:
            json.dumps(given)
        except (TypeError, ValueError):
            if name in (*PROMPT_COLUMNS, *PICTURE_COLUMNS):
                raise ValueError(
                    f"{place}: {name} is a {type(value).__name__} that JSON cannot hold; give text, numbers, lists and "
                    f"objects, and pictures as {', '.join(PICTURE_COLUMNS)}"
                ) from None
            continue
        found[str(name)] = given
    return found


def _picture(given: Any) -> Any:
    """A data URI of what is a picture; anything else as it is."""
    if isinstance(given, Mapping) and (content := given.get("bytes") or given.get("path")):
        given = content
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    if isinstance(given, list | tuple):
        return [_picture(part) for part in given]
    if hasattr(given, "__array_interface__"):  # a PIL image, or an array
        from PIL import Image

        stream = io.BytesIO()
        (given if isinstance(given, Image.Image) else Image.fromarray(given)).save(stream, "PNG")
        given = stream.getvalue()
    if isinstance(given, bytes):
        return "data:application/octet-stream;base64," + base64.b64encode(given).decode()
    return given


def _picture_bytes(entry: Mapping[str, Any]) -> int:
    """Of the pictures in an entry, about."""
    texts = [text for name in PICTURE_COLUMNS for text in _texts(entry.get(name))]
    return sum(len(text) * 3 // 4 for text in texts if text.startswith("data:"))


def _texts(value: Any) -> list[str]:
    parts = value if isinstance(value, list) else [value]
    return [part for part in parts if isinstance(part, str)]
