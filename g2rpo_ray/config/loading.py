"""The YAML loader of settings, with inheritance, presets of methods and dotted overrides. Errors are one line."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from g2rpo_ray.config.schema import Config
from g2rpo_ray.config.text import MAX_BYTES, read_yaml
from g2rpo_ray.messages import one_line, shown
from g2rpo_ray.methods import DEFAULT_METHOD, preset
from g2rpo_ray.paths import local_path, resolve

QUICKSTART = "embedded:config.yaml"
PACKAGED = Path(resolve("embedded:prompts")).parent
PLACED = "remove it: GPU and CPU in the resources beside it decide"
REMOVED = {"device": PLACED, "encoder_device": PLACED, "threads": PLACED}
"""What to do about a setting of an earlier version, by the key's last part."""
MAX_STEPS = 1000  # the bound of sampler.steps
OF_A_UNION = re.compile(
    r"(constrained-)?(float|int|str)|(literal|tuple|constrained|function-after|union|dict)\[.*"
)  # pydantic's names


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = (), **settings: Any) -> Config:
    """Read a YAML file (None: the embedded default, `NAME`: a packaged one), apply overrides and validate.

    Args:
        path: file, or name of a packaged configuration such as "flux_hps".
        overrides: `dotted.key=value` each, the value in YAML, as after `--set`.
        settings: the same as Python values: `load_config(method="mix_grpo", **{"learner.lr": 1e-3})`. A reward may be a
            function, and prompts a list or a `datasets.Dataset`: see `train`.

    A file may extend another with `extends: FILE` (in its folder, `embedded:X`, or a packaged name). A `method` in
    a file or override applies its preset below the settings given there and above the extended file. A mapping in a
    file is merged with the extended one; a mapping in an override replaces the file's.

    Raises:
        ValueError: one line with the key or file, the given value and the allowed ones.
    """
    layers = _layers(_locate(QUICKSTART if path is None else os.fspath(path)))
    given: dict[str, Any] = {}
    for key, value in [*map(_parsed, overrides), *settings.items()]:
        # also in the files' layers, so that an override replaces a mapping; but a method only where it is given
        for tree in [given] if key == "method" else [*layers, given]:
            _set(tree, key, value)
    return _validated(with_preset([*layers, given]))


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with these values by dotted key; None keeps the present value.

    Raises:
        ValueError: one line, as `load_config`.
    """
    tree = config.model_dump()
    for key, value in settings.items():
        if value is not None:
            _set(tree, key, value)
    return _validated(tree)


def _validated(settings: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError(refusal(error, Config)) from None


def _locate(name: str, key: str = "--config", folder: Path = Path()) -> str:
    """Path of the file of that name in a folder, or of the packaged configuration of that name."""
    try:
        file = folder / local_path(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    packaged = PACKAGED / f"{name}.yaml"
    if file.exists() or not name.replace("_", "").isalnum():
        return str(file)
    if not packaged.is_file():
        names = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml")))
        raise ValueError(f"{key}: {name} is neither a file nor a packaged configuration; these are {names}")
    return str(packaged)


def dump_config(config: Config) -> str:
    """The full, resolved configuration as YAML that `load_config` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def with_preset(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges layers, later ones over earlier ones, with the last method's preset below the layer that names it."""
    named = [(number, layer["method"]) for number, layer in enumerate(layers) if "method" in layer]
    name = named[-1][1] if named else DEFAULT_METHOD
    at = 0
    for number, method in reversed(named):
        if method != name:
            break
        at = number  # naming the same one again changes nothing
    below, above = merge(*layers[:at]), merge(*layers[at:])
    sampler = merge(below, above).get("sampler")
    steps = sampler.get("steps") if isinstance(sampler, Mapping) else None
    if steps is not None and not (isinstance(steps, int) and 0 < steps <= MAX_STEPS):
        return merge(below, above)  # the validation raises
    return merge(below, preset(name, steps), above)


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings key by key; later trees override earlier ones."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if nested else value
    return merged


def _layers(path: str, above: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The contents of a file and those that it extends, the most basic first."""
    if Path(path).resolve() in above:
        raise ValueError(f"extends: {path} extends itself through {above[-1].name}")
    try:
        with Path(path).open() as file:
            tree = read_yaml(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # also if it is not UTF-8
        raise ValueError(f"--config: {path} is not YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"--config: {path} must hold a mapping of settings, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return [tree]
    if not isinstance(parent, str):
        raise ValueError(f"extends: in {path}: {shown(parent)} given; must be the name of a file")
    extended = _locate(parent, f"extends: in {path}", Path(path).parent)
    return [*_layers(extended, (*above, Path(path).resolve())), tree]


def _parsed(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ValueError(f"--set: {shown(override)} given; expected section.key=value")
    try:
        return key, read_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {key}: {shown(text)} is not a YAML value: {one_line(error, 100)}") from None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"--set {key}: {parent} is not a section")
        tree = child
    tree[leaf] = value


def refusal(error: ValidationError, model: type[BaseModel]) -> str:
    """The errors of a model's validation in one line: the first one, and the number of others."""
    first, *others = error.errors()
    location = _location(first)
    members = [other for other in others if _location(other) == location]  # the other types of a union
    others = [other for other in others if other not in members]
    message = ", or ".join(dict.fromkeys(_message(part) for part in [first, *members]))
    if first["type"] == "value_error":  # our own validators name the key themselves
        line = ".".join([*location, first["msg"].removeprefix("Value error, ")])
    elif first["type"] == "extra_forbidden":
        line = f"{'.'.join(location)}: unknown key; {REMOVED.get(location[-1]) or _allowed(location, model)}"
    elif first["type"] == "missing":
        line = f"{'.'.join(location)}: missing; add it to the file"
        line += f" or give --set {'.'.join(location)}=..." if model is Config else ""
    else:
        line = f"{'.'.join(location)}: {shown(first['input'])} given; {message}"
    return line + (f" (and {len(others)} more)" if others else "")


def _location(error: ErrorDetails) -> list[str]:
    return [one_line(part, 60) for part in error["loc"] if not OF_A_UNION.fullmatch(str(part))]


def _message(error: ErrorDetails) -> str:
    return error["msg"][0].lower() + error["msg"][1:]


def _allowed(location: list[str], model: type[BaseModel]) -> str:
    section: Any = model
    for part in location[:-1]:
        kind = get_args(section)[1] if get_origin(section) is dict else section.model_fields[part].annotation
        models = [one for one in get_args(kind) if isinstance(one, type) and issubclass(one, BaseModel)]
        section = models[0] if models and get_origin(kind) is not dict else kind  # of `Section | None`
    keys = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], keys, n=1)
    return f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"allowed are {', '.join(keys)}"
