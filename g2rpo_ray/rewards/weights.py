"""Loading of reward models: checkpoints, devices, dtypes. Errors are one line."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards.files import is_hub_id

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_placement(device: str, dtype: str) -> torch.dtype:
    """The torch dtype of that name. ValueError for an unknown dtype or a device that torch cannot use."""
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype: {dtype!r} given; allowed are {', '.join(DTYPES)}; float32 reproduces published scores"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts if it is built without that kind of device
        raise ValueError(f"device: {device!r} cannot be used ({one_line(error)}); cpu always works") from error
    return DTYPES[dtype]


def place(network: nn.Module, device: str, dtype: torch.dtype) -> Any:
    """The network in evaluation mode on its device, in its dtype, without gradients."""
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def read_weights(path: Path, key: str = "") -> dict[str, Tensor]:
    """The state dict of a .safetensors file or a file of torch.save, in the latter under `key` if given."""
    reader = "safetensors" if path.suffix == ".safetensors" else "torch.load(weights_only=True)"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise errors of their parser, of the zip reader or of the disk
        raise ValueError(f"checkpoint: {reader} cannot read {path}: {one_line(error)}") from error
    weights = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(weights, dict):
        expected = f"a state dict under the key {key!r}" if key else "a state dict"
        raise ValueError(f"checkpoint: {path} does not contain {expected}; give the file as published")
    return weights


def fit_weights(network: nn.Module, weights: dict[str, Tensor], path: Path, expected: str) -> None:
    """Loads all weights. ValueError if keys or shapes are not those of the network, described by `expected`."""
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint: {path} does not fit {expected}; give both of the same model: {one_line(error)}"
        ) from error


def pretrained(factory: Any, option: str, name: str, **options: Any) -> Any:
    """`factory.from_pretrained` (of transformers) of a directory or hub id.

    Raises:
        ValueError: one line that begins with `option`; it cannot be loaded, or weights of a model are missing.
    """
    remedy = "give a directory in transformers' format, or a hub id org/name"
    if not Path(name).is_dir() and not is_hub_id(name):
        raise ValueError(f"{option}: no directory {name!r}; {remedy}")
    is_model = issubclass(factory, nn.Module) or factory.__name__.startswith("AutoModel")
    try:
        loaded = factory.from_pretrained(name, **options, **({"output_loading_info": True} if is_model else {}))
    except Exception as error:  # OSError, ValueError, RuntimeError or the hub client's
        raise ValueError(f"{option}: {factory.__name__} cannot load {name}; {remedy}: {one_line(error)}") from error
    if not is_model:
        return loaded
    model, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(f"{option}: {name} is not a complete {factory.__name__}; missing are {one_line(missing)}")
    return model
