"""The LoRA of a diffusers transformer (through PEFT): added, read out, put in, checked. Never merged.

A state is {name: float32 array}, the names those of PEFT without the adapter's own ("... .to_q.lora_A.weight", A
[rank, in], B [out, rank]): the same in memory and in a checkpoint. See `adapter_file` for others.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

from g2rpo_ray.config import LoraConfig, ModelConfig
from g2rpo_ray.models.base import FlowModel, family_of
from g2rpo_ray.types import FloatArray, WeightsManifest

ADAPTER = "default"


class WeightsMismatch(RuntimeError):
    """Weights differ from their manifest."""


def add_lora(transformer: Any, config: LoraConfig, seed: int) -> None:
    """Adds a LoRA with A ~ N(0, 1/rank²) and B = 0, which does not change the model until B is trained.

    The LoRA is float32 on a base of any dtype, and only it requires a gradient. `seed` decides A; the global random
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
        targets, idle = family_of(transformer).lora_targets, idle_modules(transformer)
        return [name for name in linear if any(_ends_with(name, t) for t in targets) and name not in idle]
    for target in config.targets:
        if not any(_ends_with(name, target) for name in linear):
            raise ValueError(
                f"lora.targets: {target!r} is not the suffix of a linear layer's name in this transformer; "
                f"give `all-linear` or suffixes of names such as {linear[-2]}"
            )
    return [name for name in linear if any(_ends_with(name, target) for target in config.targets)]


def idle_modules(transformer: nn.Module) -> set[str]:
    """Linear layers whose output the family's last block does not use, so that a LoRA there has no gradient."""
    blocks = getattr(transformer, "transformer_blocks", ())
    return {f"transformer_blocks.{len(blocks) - 1}.{name}" for name in family_of(transformer).lora_idle}


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
    """Copies of the LoRA's parameters. Not for ZeRO-3, which partitions each parameter."""
    return {
        name: parameter.detach().float().cpu().numpy().copy()
        for name, parameter in lora_parameters(transformer).items()
    }


@torch.no_grad()
def load_lora(transformer: nn.Module, state: Mapping[str, FloatArray]) -> None:
    """Copies a state into the transformer's LoRA, in place; all of it or nothing.

    Raises:
        ValueError: it is not the state of a LoRA of the same layers and rank.
    """
    parameters = lora_parameters(transformer)
    check_lora({name: tuple(parameter.shape) for name, parameter in parameters.items()}, state)
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(np.array(state[name])))  # a copy: Ray's arrays cannot be written to


def lora_shapes(model: ModelConfig, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the LoRA's tensors on this model, from its configuration file; no weights are read."""
    transformer = FlowModel.skeleton(model).transformer
    add_lora(transformer, config, seed=0)
    return {name: tuple(parameter.shape) for name, parameter in lora_parameters(transformer).items()}


def check_lora(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, FloatArray]) -> None:
    """Raises ValueError, in one line, if `state` is not of a LoRA with these shapes."""
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
    """A context in which the transformer is the base model, the reference policy."""
    transformer.disable_lora()
    try:
        yield
    finally:
        transformer.enable_lora()


def manifest_of(state: Mapping[str, FloatArray], version: int) -> WeightsManifest:
    """The manifest of a state: version, number of tensors, checksum."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name]
        digest.update(f"{name}\0{array.shape}\0{array.dtype.str}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return WeightsManifest(version, len(state), sum(array.nbytes for array in state.values()), digest.hexdigest())


def verify(state: Mapping[str, FloatArray], manifest: WeightsManifest) -> None:
    """Checks that `state` equals its manifest, bit for bit.

    Raises:
        WeightsMismatch: it is not.
    """
    found = manifest_of(state, manifest.version)
    if found != manifest:
        raise WeightsMismatch(
            f"LoRA version {manifest.version}: received {found.tensors} tensors of {found.bytes} bytes with checksum "
            f"{found.checksum[:12]}, expected {manifest.tensors} of {manifest.bytes} with {manifest.checksum[:12]}"
        )
