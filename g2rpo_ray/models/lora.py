"""The LoRA of a diffusers transformer (through PEFT): added, read out, put in, checked, exported. Never merged.

A state is {name: float32 array}, the names those of PEFT without the adapter's own ("... .to_q.lora_A.weight", A
[rank, in], B [out, rank]): the same in memory, in a checkpoint and in an export, which puts "transformer." before them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from g2rpo_ray.config import LoraConfig, ModelConfig
from g2rpo_ray.models.base import FlowModel, family_of
from g2rpo_ray.types import FloatArray, WeightsManifest

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
PREFIX = "transformer."


class WeightsMismatch(RuntimeError):
    """Weights that are not those of their manifest."""


def add_lora(transformer: Any, config: LoraConfig, seed: int) -> None:
    """Add a LoRA with A ~ N(0, 1/rank²) and B = 0: the model is unchanged until B is trained.

    The LoRA is float32 on a base of any dtype, and alone requires a gradient. `seed` decides A; the global random
    state is left as it was.
    """
    targets = _target_modules(transformer, config)
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # declared int, used as a factor
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU; torch.manual_seed would reseed CUDA too
        torch.default_generator.manual_seed(seed)
        transformer.add_adapter(adapter, ADAPTER)
    transformer.requires_grad_(False)
    for parameter in lora_parameters(transformer).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _target_modules(transformer: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if config.targets == "all-linear":
        return linear
    if config.targets is None:
        family, blocks = family_of(transformer), getattr(transformer, "transformer_blocks", ())
        idle = {f"transformer_blocks.{len(blocks) - 1}.{name}" for name in family.lora_idle}
        return [name for name in linear if any(_ends_with(name, t) for t in family.lora_targets) and name not in idle]
    for target in config.targets:
        if not any(_ends_with(name, target) for name in linear):
            raise ValueError(
                f"lora.targets: {target!r} is not the ending of any linear layer of this transformer; "
                f"use `all-linear` or endings of names such as {linear[-2]}"
            )
    return [name for name in linear if any(_ends_with(name, target) for target in config.targets)]


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA's parameters, sorted by name."""
    found = {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_" in name
    }
    return dict(sorted(found.items()))


def lora_state(transformer: nn.Module) -> dict[str, FloatArray]:
    """Copies of the LoRA's parameters. Not for ZeRO-3, where a rank holds a piece of each."""
    return {
        name: parameter.detach().float().cpu().numpy().copy()
        for name, parameter in lora_parameters(transformer).items()
    }


@torch.no_grad()
def load_lora(transformer: nn.Module, state: Mapping[str, FloatArray]) -> None:
    """Put a state into the LoRA that the transformer has, in place; all of it or nothing.

    Raises:
        ValueError: it is not the state of a LoRA of the same layers and rank.
    """
    parameters = lora_parameters(transformer)
    check_lora({name: tuple(parameter.shape) for name, parameter in parameters.items()}, state)
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(np.array(state[name])))  # a copy: Ray's arrays cannot be written to


def lora_shapes(model: ModelConfig, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the LoRA's tensors on this model, from its configuration file alone: no weights are read."""
    transformer = FlowModel.skeleton(model).transformer
    add_lora(transformer, config, seed=0)
    return {name: tuple(parameter.shape) for name, parameter in lora_parameters(transformer).items()}


def check_lora(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, FloatArray]) -> None:
    """Raise ValueError, in one line, if `state` is not that of a LoRA of these shapes."""
    if missing := shapes.keys() - state.keys():
        raise ValueError(_another_model(f"{len(missing)} tensors are missing, such as {min(missing)}"))
    if unexpected := state.keys() - shapes.keys():
        raise ValueError(_another_model(f"{len(unexpected)} tensors are unexpected, such as {min(unexpected)}"))
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ValueError(_another_model(f"{name} is {state[name].shape}, not {shape}"))


def _another_model(difference: str) -> str:
    return f"a LoRA of another model or of another lora.rank or lora.targets: {difference}"


@contextmanager
def lora_disabled(transformer: Any) -> Iterator[None]:
    """The reference policy: inside, the transformer is the base model."""
    transformer.disable_lora()
    try:
        yield
    finally:
        transformer.enable_lora()


@contextmanager
def lora_replaced(transformer: nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Another policy: inside, the LoRA layers use these tensors in place of their parameters. For inference only.

    The parameters stay where they are: ZeRO may hold a piece of each, and an adapter of PEFT's would be its, too.
    """
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLinear)}
    try:
        for name, layer in layers.items():
            down, up = (state[f"{name}.lora_{part}.weight"] for part in "AB")
            layer.forward = partial(_lora_linear, layer, down, up)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def _lora_linear(layer: LoraLinear, down: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What PEFT's layer does, in the same order."""
    result: torch.Tensor = layer.base_layer(x)
    added = F.linear(F.linear(x.to(down.dtype), down), up) * layer.scaling[ADAPTER]
    return (result + added).to(result.dtype)


def describe(state: Mapping[str, FloatArray], version: int) -> WeightsManifest:
    """What a receiver of `state` must find."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name]
        digest.update(f"{name}\0{array.shape}\0{array.dtype.str}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return WeightsManifest(version, len(state), sum(array.nbytes for array in state.values()), digest.hexdigest())


def verify(state: Mapping[str, FloatArray], manifest: WeightsManifest) -> None:
    """Check that `state` is, bit for bit, what the manifest describes.

    Raises:
        WeightsMismatch: it is not.
    """
    found = describe(state, manifest.version)
    if found != manifest:
        raise WeightsMismatch(
            f"LoRA version {manifest.version}: received {found.tensors} tensors of {found.bytes} bytes with checksum "
            f"{found.checksum[:12]}, expected {manifest.tensors} of {manifest.bytes} with {manifest.checksum[:12]}"
        )


def export_lora(directory: str | Path, state: Mapping[str, FloatArray], config: LoraConfig, pipeline: Any) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` of this class reads with rank and alpha.

    Equal states are equal files.
    """
    layers = sorted({name.split(".lora_")[0] for name in state})
    pipeline.save_lora_weights(
        directory,
        transformer_lora_layers={name: torch.from_numpy(np.array(array)) for name, array in state.items()},
        # without metadata diffusers takes alpha for equal to the rank
        transformer_lora_adapter_metadata={"r": config.rank, "lora_alpha": config.alpha, "target_modules": layers},
    )
    _sort_metadata(Path(directory) / FILE)


def _sort_metadata(file: Path) -> None:
    """Put the header's metadata in order: safetensors writes them in another one every time."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        stream.seek(8)
        stream.write(text)


def read_lora(path: str | Path) -> dict[str, FloatArray]:
    """The state in an export: a file, or a directory that holds one.

    Raises:
        ValueError: there is none, or it is not the LoRA of a transformer.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"LoRA {path}: cannot read {file.name} ({error}); give a folder with {FILE}") from None
    strange = [name for name in tensors if not (name.startswith(PREFIX) and ".lora_" in name)]
    if strange or not tensors:
        found = strange[0] if strange else "nothing"
        raise ValueError(f"LoRA {path}: holds {found}; expected tensors named {PREFIX}*.lora_[AB].weight only")
    return {name.removeprefix(PREFIX): tensors[name].float().numpy() for name in sorted(tensors)}
