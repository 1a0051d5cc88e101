"""Reads adapters by name, and refuses those that differ from `lora` in the configuration."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from g2rpo_ray.config import Config
from g2rpo_ray.paths import local_path
from g2rpo_ray.types import FloatArray

BASE = "base"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA with the user's name for it. The base is one of zeros."""

    name: str
    path: str
    state: Mapping[str, FloatArray]


def read_adapters(given: Mapping[str, str | os.PathLike[str]] | Sequence[str], config: Config) -> list[Adapter]:
    """The base, then the adapters, a file or folder each, by name or as NAME=PATH.

    Raises:
        ValueError: one line; a name or file cannot be used, or an adapter differs from `lora` in the configuration.
    """
    from g2rpo_ray.models import check_lora, describe_model, lora_shapes, read_lora

    adapters: list[Adapter] = []
    model_is_here = config.model.is_local
    try:
        shapes = lora_shapes(config.model, config.lora) if model_is_here or not given else {}
        pipeline = describe_model(config.model)[0].pipeline_class if model_is_here else None
    except OSError as error:  # of the hub
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"model.path: cannot read {config.model.path} ({reason}); give --adapter") from None
    for argument in given if not isinstance(given, Mapping) else [f"{name}={os.fspath(given[name])}" for name in given]:
        name, separator, path = argument.partition("=")
        if not separator or not name.strip() or not path or "|" in name or "\n" in name:
            raise ValueError(f"--adapter: {argument!r} given; expected NAME=PATH, without | in the name")
        if name in (BASE, *(adapter.name for adapter in adapters)):
            raise ValueError(f"--adapter: the name {name!r} is used twice; give each adapter another name")
        try:
            state = read_lora(local_path(path), config.lora, pipeline)
            shapes = shapes or {tensor: array.shape for tensor, array in state.items()}
            check_lora(shapes, state)
        except ValueError as error:
            raise ValueError(f"--adapter {name}: {error}") from None
        adapters.append(Adapter(name, path, state))
    zeros = {tensor: np.zeros(shape, dtype=np.float32) for tensor, shape in shapes.items()}
    return [Adapter(BASE, "", zeros), *adapters]
