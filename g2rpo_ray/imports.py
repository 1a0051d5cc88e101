"""Imports objects of the user by import path."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from g2rpo_ray.messages import one_line, shown

T = TypeVar("T")
FORM = "package.module:name"


def imported(path: str) -> Any:
    """Import the object with the import path `package.module:name`.

    Raises:
        ValueError: it cannot be imported; one line with the reason, without the setting's name.
    """
    module, separator, name = path.partition(":")
    if not separator or not module or not name.isidentifier():
        raise ValueError(f"{shown(path)} is not an import path; expected {FORM}")
    try:
        return getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything, or end the process
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f"{path} cannot be imported ({reason}); correct it, or put its folder on PYTHONPATH"
        ) from error


def named(key: str, name: str, known: Mapping[str, T]) -> T:
    """The entry `name` of `known`, or the object with that import path.

    Raises:
        ValueError: there is neither; one line that begins with `key`.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        raise ValueError(f"{key}: {name!r} given; allowed are {', '.join(known)}, or your own as {FORM}")
    try:
        found: T = imported(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return found
