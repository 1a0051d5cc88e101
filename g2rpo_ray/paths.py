"""Names of files in settings and options, made into paths on the machine that uses them."""

import os
import re
from pathlib import Path

from g2rpo_ray.messages import shown

EMBEDDED = "embedded:"
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of Linux's file systems
URI_WITH_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def resolve(name: str) -> str:
    """The path or hub id that `name` stands for, on this machine.

    `embedded:X` is a file that ships with the package, wherever it is installed: `embedded:scenes/X` one of that world,
    `embedded:prompts/X` one of the configurations, any other X one of the quickstart. A name that starts with `~` is
    expanded if there is such a user; anything else is kept as it is.
    """
    if name.startswith(EMBEDDED):
        file, package = name.removeprefix(EMBEDDED), Path(__file__).parent
        within = {"scenes": "worlds", "prompts": "configs"}.get(file.split("/")[0], "worlds/quickstart")
        return str(package / within / file)
    return os.path.expanduser(name)


def local_path(name: str) -> Path:
    """The path that `name` stands for, on this machine.

    Raises:
        ValueError: one line with the name and the reason; no file can be called so. The caller adds the option.
    """
    if fault := path_fault(name):
        raise ValueError(f"{shown(name)} given; {fault}")
    return Path(resolve(name))


def path_fault(name: str) -> str:
    """Why no file can have this name, and what to do; "" if one can."""
    path = resolve(name)
    if not path:
        return "the name is empty; give a path"
    if path.startswith("~"):
        return f"there is no user {shown(path[1:].split('/')[0])} on this machine; give the whole path"
    if URI_WITH_ONE_SLASH.match(path):
        return "a URI has two slashes after the colon; add one, or start a path with ./"
    try:
        parts = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        return "the name cannot be encoded as UTF-8; give another"
    if any(b"\0" in part for part in parts):
        return "the name holds a NUL character; delete it"
    if max(map(len, parts)) > MAX_NAME_BYTES or len(b"/".join(parts)) > MAX_PATH_BYTES:
        return f"a file's name may have {MAX_NAME_BYTES} bytes, its path {MAX_PATH_BYTES}; shorten it"
    return ""


def place_fault(name: str) -> str:
    """`path_fault` for a path or a URI."""
    address = name.partition("://")[2].partition("?")[0]
    if "://" not in name:
        return path_fault(name)
    return "" if address.strip("/") else "the URI names no bucket or folder; give one, as in s3://bucket/runs"
