"""Adapters named on a command line: read, and refused where they are not what the configuration describes."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2rpo_ray.config import Config, LoraConfig
from g2rpo_ray.files import resolve
from g2rpo_ray.types import FloatArray

BASE = "base"
METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha in a safetensors file


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA by the name that the user gave it; the base is one that changes nothing."""

    name: str
    path: str
    state: Mapping[str, FloatArray]


def read_adapters(given: Sequence[str], config: Config) -> list[Adapter]:
    """The base, then the adapters given as NAME=PATH, a file or folder each.

    Raises:
        ValueError: one line; a name or file can't be used, or the adapter is not as `lora` in the configuration says.
    """
    from g2rpo_ray.models import check_lora, lora_shapes

    adapters: list[Adapter] = []
    model_is_here = Path(resolve(config.model.path)).is_dir()
    try:
        shapes = lora_shapes(config.model, config.lora) if model_is_here or not given else {}
    except OSError as error:  # of the hub
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"model.path: cannot read {config.model.path} here ({reason}); give --adapter") from None
    for argument in given:
        name, separator, path = argument.partition("=")
        if not separator or not name.strip() or not path or "|" in name or "\n" in name:
            raise ValueError(f"--adapter: {argument!r} given; must look like NAME=PATH, without | in the name")
        if name in (BASE, *(adapter.name for adapter in adapters)):
            raise ValueError(f"--adapter: the name {name!r} is taken; give each adapter a name of its own")
        try:
            state = _read(resolve(path), config.lora)
            shapes = shapes or {tensor: array.shape for tensor, array in state.items()}
            check_lora(shapes, state)
        except ValueError as error:
            raise ValueError(f"--adapter {name}: {error}") from None
        adapters.append(Adapter(name, path, state))
    zeros = {tensor: np.zeros(shape, dtype=np.float32) for tensor, shape in shapes.items()}
    return [Adapter(BASE, "", zeros), *adapters]


def _read(path: str, lora: LoraConfig) -> Mapping[str, FloatArray]:
    """The weights in an export, or in a file of diffusers, of this rank and alpha."""
    from safetensors import safe_open

    from g2rpo_ray.models import read_lora
    from g2rpo_ray.models.lora import FILE

    state = read_lora(path)
    with safe_open(Path(path) / FILE if Path(path).is_dir() else path, "np") as stream:
        metadata = json.loads((stream.metadata() or {}).get(METADATA, "{}"))
    rank = next((len(array) for name, array in state.items() if ".lora_A" in name), 0)
    alpha = metadata.get("transformer.lora_alpha", rank)  # diffusers, too, takes a missing one for the rank
    for key, found, expected in (("rank", rank, lora.rank), ("alpha", alpha, lora.alpha)):
        if found != expected:
            raise ValueError(
                f"{path} has {key} {found:g}, but lora.{key} is {expected:g}; give --set lora.{key}={found:g}"
            )
    return state
