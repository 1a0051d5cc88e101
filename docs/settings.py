"""Prints docs/settings.md, from the settings' own types, bounds and docstrings: `python docs/settings.py`.

`python docs/settings.py --write` writes the file.
"""

import argparse
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from g2rpo_ray.analysis.tables import markdown_table
from g2rpo_ray.config import Config, RewardConfig
from g2rpo_ray.methods import NEUTRAL, method_names, preset

FILE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

Every setting, as `section.key` in a file or `--set section.key=value` on the command line. This file is made by
`python docs/settings.py --write` from the models in `g2rpo_ray/config/`; a test compares the two. What to change when
is in [tuning.md](tuning.md).

A setting with *by method* is filled by `method: NAME`, unless a file gives it beside `method`, or later. First comes
the value of all methods that are not named, then those of the others, at the number of steps of their papers.
"""
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "unset", Any: "anything"}


def table(model: type[BaseModel], section: str) -> str:
    """A table of one section: a row a setting."""
    return markdown_table(["key", "type, bounds", "default", "meaning"], rows(model, section))


def rows(model: type[BaseModel], section: str) -> Iterator[list[str]]:
    """Of a section, and of those within it."""
    for name, field in model.model_fields.items():
        key = f"{section}.{name}" if section else name
        if not is_section(field):
            meaning = " ".join((field.description or "").split())
            cells = (f"`{key}`", kind(field), default(field), meaning + by_method(section, name))
            yield [cell.replace("|", "\\\\|") for cell in cells]
        elif section:
            yield from rows(field.annotation, key)  # type: ignore[arg-type]


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def kind(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    bounds = [
        f"{sign} {getattr(found, name):,}"
        for found in field.metadata
        for name, sign in signs.items()
        if getattr(found, name, None) is not None
    ]
    return ", ".join([words(field.annotation), *bounds])


def words(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(words(part) for part in inner)
    if origin is tuple:
        return f"list of {words(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} of {words(inner[0])}"
    if origin is dict:
        return f"mapping of {words(inner[0])} to {words(inner[1])}"
    if hasattr(annotation, "__metadata__"):
        return words(inner[0])
    return WORDS.get(annotation, "a reward" if annotation is RewardConfig else str(annotation))


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "unset" if value is None else f"`{json.dumps(value)}`"


def by_method(section: str, name: str) -> str:
    """Which methods give the setting a value that is not the neutral one."""
    if name not in NEUTRAL.get(section, {}) and (section, name) != ("sampler", "steps"):
        return ""
    neutral = NEUTRAL[section].get(name, ...)
    given: dict[str, list[str]] = {}
    for method in method_names():
        value = preset(method)[section][name]
        if value != neutral:
            given.setdefault(json.dumps(value), []).append(method)
    parts = [f"`{value}` {', '.join(names)}" for value, names in given.items()]
    parts = parts if neutral is ... else [f"`{json.dumps(neutral)}`", *parts]
    return f" *By method:* {'; '.join(parts)}"


def sections() -> Iterator[tuple[str, str]]:
    """Title and table of each section."""
    yield "The run", table(Config, "")
    for name, field in Config.model_fields.items():
        if is_section(field):
            yield name, table(field.annotation, name)  # type: ignore[arg-type]
    yield "rewards.NAME, eval_rewards.NAME", table(RewardConfig, "rewards.NAME")


def render() -> str:
    return HEAD + "".join(f"\n## {title}\n\n{rows}\n" for title, rows in sections())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} beside this file")
    if parser.parse_args().write:
        FILE.write_text(render())
    else:
        print(render(), end="")
