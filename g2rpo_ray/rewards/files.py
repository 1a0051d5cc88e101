"""Files of reward models, by path or hub name. It imports nothing slow, since checks before the start use it."""

import json
import re
from pathlib import Path
from typing import Any

from g2rpo_ray.messages import one_line
from g2rpo_ray.paths import EMBEDDED

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILE = re.compile(HUB_ID.pattern + r":\S+")


def is_hub_id(name: str) -> bool:
    """True if `name` can be a hub repository: org/name."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(EMBEDDED)


def is_hub_file(name: str) -> bool:
    """True if `name` can be a file on the hub: org/name:file."""
    return HUB_FILE.fullmatch(name) is not None and not name.startswith(EMBEDDED)


def locate(option: str, name: str, example: str) -> Path:
    """The file at path `name`, or the hub file org/name:file, downloaded if it is not cached.

    Raises:
        ValueError: one line that begins with `option`.
    """
    if Path(name).is_file():
        return Path(name)
    remedy = f"give the path of a file, or a hub file as repo:file, e.g. {example}"
    if not is_hub_file(name):
        raise ValueError(f"{option}: no file {name!r}; {remedy}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(*name.split(":", 1)))
    except Exception as error:  # the hub client has a class for each of network, authentication, offline mode and name
        raise ValueError(f"{option}: cannot download {name!r} ({one_line(error)}); {remedy}") from error


def read_json(option: str, path: str, keys: tuple[str, ...], meaning: str) -> dict[str, Any]:
    """The object in the JSON file at `path`, which must have all `keys`. `meaning` describes the file in errors."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: cannot read {path} as JSON: {error}; it must be {meaning}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{option}: {path} lacks {', '.join(missing)}; it must be {meaning}")
    return dict(content)
