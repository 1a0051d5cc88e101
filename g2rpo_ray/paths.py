"""Converts names of files in settings and options to paths on this machine."""

import os
import re
from pathlib import Path

from g2rpo_ray.messages import shown

EMBEDDED = "embedded:"
PARENTS = {"scenes": "worlds", "edit_quickstart": "worlds", "video_quickstart": "worlds", "prompts": "configs"}
"""The package's folder that has a name's first folder; any other name is in worlds/quickstart."""
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # Linux
URI_WITH_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def resolve(name: str) -> str:
    """The path or hub id of `name` on this machine.

    `embedded:X` is a file of the installed package: `embedded:W/X` is in worlds/W for scenes, edit_quickstart and
    video_quickstart, `embedded:prompts/X` in configs/prompts, any other X in worlds/quickstart. A leading `~` or
    `~user` is expanded if there is such a user. Other names are unchanged.
    """
    if name.startswith(EMBEDDED):
        file, package = name.removeprefix(EMBEDDED), Path(__file__).parent
        return str(package / PARENTS.get(file.split("/")[0], "worlds/quickstart") / file)
    return os.path.expanduser(name)


def local_path(name: str) -> Path:
    """The path of `name` on this machine.

    Raises:
        ValueError: no file can have this name; one line with the name and the reason. The caller adds the option.
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
