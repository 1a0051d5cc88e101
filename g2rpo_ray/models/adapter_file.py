"""Files of adapters: writes diffusers' format, and reads those of diffusers, PEFT, kohya and ai-toolkit.

A file's effect is alpha / rank · B A. Programs disagree about where alpha is stored, so exports have alpha = rank, with
the rest of the factor in B.
"""

import json
import logging
import math
import re
import textwrap
from collections.abc import Mapping
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor

from g2rpo_ray.config import LoraConfig
from g2rpo_ray.types import FloatArray

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in a safetensors file
PREFIX = "transformer."
PEFT_FILE, PEFT_SETTINGS, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

NATIVE = re.compile(r".+\.(lora_A\.weight|lora_B\.weight|alpha)")
FOREIGN = re.compile(r".+\.((lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight|alpha)")
PREFIXES = (PREFIX, PEFT_PREFIX, "diffusion_model.", "lora_unet_", "lora_transformer_")
OTHER_MODELS = ("text_encoder", "lora_te", "unet.")

OTHER_ARITHMETIC = (
    "alpha_pattern", "use_rslora", "use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Settings of PEFT with which a layer does not add alpha / rank · B A with one alpha."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's `init_lora_weights` that do not change the base's weights."""


def export_lora(directory: str | Path, state: Mapping[str, FloatArray], config: LoraConfig, pipeline: Any) -> None:
    """Writes `pytorch_lora_weights.safetensors` with alpha = rank, so that its effect is the same in all programs.

    Equal states give equal files.
    """
    layers = sorted({name.split(".lora_")[0] for name in state})
    scaled = scale_lora(state, config.alpha / config.rank)
    pipeline.save_lora_weights(
        directory,
        transformer_lora_layers={name: torch.from_numpy(array) for name, array in scaled.items()},
        transformer_lora_adapter_metadata={"r": config.rank, "lora_alpha": config.rank, "target_modules": layers},
    )
    _sort_metadata(Path(directory) / FILE)


def scale_lora(state: Mapping[str, FloatArray], factor: float) -> dict[str, FloatArray]:
    """A copy whose B is multiplied by `factor`."""
    with np.errstate(over="ignore"):  # the caller looks for infinities
        return {
            name: (array.astype(np.float64) * factor).astype(np.float32) if ".lora_B." in name else np.array(array)
            for name, array in state.items()
        }


def _sort_metadata(file: Path) -> None:
    """Sorts the header's metadata, which safetensors writes in a random order."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        stream.seek(8)
        stream.write(text)


def check_adapter_file(path: str | Path) -> None:
    """Checks a file like `read_lora`, as far as possible without the model.

    Raises:
        ValueError: one line; there is no adapter, or no LoRA has its effect.
    """
    try:
        _read(Path(path))
    except ValueError as error:
        raise ValueError(f"LoRA {path}: {error}") from None


def read_lora(path: str | Path, config: LoraConfig, pipeline: Any = None) -> dict[str, FloatArray]:
    """The state of an adapter, for a LoRA of this configuration: a file, or a folder of diffusers or PEFT.

    B is scaled such that with `config.alpha` the LoRA has the effect which the adapter has with its own alpha, or with
    alpha = rank where it stores none.

    Args:
        pipeline: class of the model's pipeline, whose converter reads other formats than those of diffusers and PEFT.

    Raises:
        ValueError: one line; there is no adapter, it is of another rank, or no LoRA has its effect.
    """
    try:
        tensors, prefix, settings = _read(Path(path))
        if not all(name.startswith(prefix) and NATIVE.fullmatch(name) for name in tensors):
            tensors, prefix = _convert(tensors, pipeline), PREFIX
        return _state({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, settings, config)
    except ValueError as error:
        raise ValueError(f"LoRA {path}: {error}") from None


def _read(path: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The checked tensors, the prefix of layers' names, and PEFT's settings as far as they are stored."""
    tensors, metadata, file = _load(path)
    prefix, settings = _settings(file, metadata)
    _check_settings(settings)
    _check_tensors(tensors)
    return tensors, prefix, settings


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """Tensors and metadata of the file, and its path."""
    file = path
    if path.is_dir():
        file = path / (PEFT_FILE if (path / PEFT_FILE).exists() and not (path / FILE).exists() else FILE)
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in sorted(content.keys())}
            return tensors, content.metadata() or {}, file
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot read {file.name} ({error}); give a safetensors file, or a folder with {FILE} or {PEFT_FILE}"
        ) from None


def _settings(file: Path, metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The prefix of layers' names, and PEFT's settings as far as they are stored."""
    if file.name == PEFT_FILE:
        try:
            return PEFT_PREFIX, _object((file.parent / PEFT_SETTINGS).read_text("utf-8", "replace"), PEFT_SETTINGS)
        except OSError as error:
            raise ValueError(
                f"cannot read {PEFT_SETTINGS}, which has the adapter's alpha ({error}); add it to the folder"
            ) from None
    stored = _object(metadata.get(METADATA, "{}"), f"the file's metadata {METADATA}")
    if "r" in stored:  # written by the transformer itself, not by its pipeline
        return "", stored
    return PREFIX, {k.removeprefix(PREFIX): v for k, v in stored.items() if k.startswith(PREFIX)}


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        given = textwrap.shorten(text, 60, placeholder=" ...")
        raise ValueError(f"{where} is {given!r}; must be a JSON object with PEFT's settings")
    return found


def _check_settings(settings: Mapping[str, Any]) -> None:
    kind, start = settings.get("peft_type", "LORA"), settings.get("init_lora_weights")
    found = [f"{key}={settings[key]}" for key in OTHER_ARITHMETIC if settings.get(key)]
    found += [f"peft_type={kind}"] if kind != "LORA" else []
    found += [f"init_lora_weights={start}, which changes the base"] if start not in PLAIN_STARTS else []
    if found:
        raise ValueError(
            f"was made with {found[0]}; only a plain LoRA is supported, which adds alpha / rank · B A to the base's "
            "layers with one alpha"
        )


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, in one line, for tensors that are not a LoRA of the transformer only, or are damaged."""
    expected = "expected the LoRA of a transformer only, tensors named ...lora_A.weight and ...lora_B.weight"
    if not tensors:
        raise ValueError(f"is empty; {expected}")
    for name, tensor in tensors.items():
        if name.startswith(OTHER_MODELS) or not FOREIGN.fullmatch(name):
            raise ValueError(f"contains {name}; {expected}")
        if name.endswith(".alpha"):
            _positive(tensor.item() if tensor.numel() == 1 else None, name)
        elif not tensor.is_floating_point() or tensor.ndim != 2:
            raise ValueError(f"{name} is {_kind(tensor)}; must be a matrix of floating-point numbers")
        elif not tensor.float().isfinite().all():
            raise ValueError(f"{name} has values that are not finite in float32")
    examples = {_prefix(name): name for name in tensors}
    if len(examples) > 1:  # some converters drop tensors with other names
        raise ValueError(f"contains tensors named in two ways, {' and '.join(examples.values())}; {expected}")


def _prefix(name: str) -> str:
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{where} is {value!r}; must be a positive number")
    return float(value)


def _convert(tensors: Mapping[str, Tensor], pipeline: Any) -> dict[str, Tensor]:
    """All tensors with diffusers' names; raises if a converter drops one."""
    example, known = min(tensors), "known are diffusers' files and PEFT's folders"
    if pipeline is None:
        raise ValueError(f"contains {example}; {known}; other formats need the model's files on this machine")
    # diffusers' converter for FLUX.1 knows these layer names only with kohya's names of A and B
    renamed = {name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up."): name for name in tensors}
    for given in (tensors, {new: tensors[name] for new, name in renamed.items()}):
        converted = _by_diffusers(given, pipeline)
        if converted and all(name.startswith(PREFIX) and NATIVE.fullmatch(name) for name in converted):
            return converted
    raise ValueError(f"contains {example}; {known}; diffusers does not convert such names for a {pipeline.__name__}")


def _by_diffusers(tensors: Mapping[str, Tensor], pipeline: Any) -> dict[str, Tensor]:
    exact = {name: tensor.float() for name, tensor in tensors.items()}  # converters multiply by alpha in this dtype
    logger, heard = logging.getLogger("diffusers"), BufferingHandler(capacity=10_000)
    logger.addHandler(heard)
    diffusers_logging.disable_default_handler()
    try:
        converted: dict[str, Tensor] = pipeline.lora_state_dict(exact)
    except Exception as error:  # converters raise KeyError, AssertionError ...
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise ValueError(f"diffusers cannot convert it for a {pipeline.__name__} ({reason})") from None
    finally:
        logger.removeHandler(heard)
        diffusers_logging.enable_default_handler()
    if dropped := [record.getMessage() for record in heard.buffer if record.levelno >= logging.WARNING]:
        raise ValueError(f"diffusers cannot convert all of it ({textwrap.shorten(dropped[0], 200)})")
    return converted


def _state(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], config: LoraConfig) -> dict[str, FloatArray]:
    """The state {name: float32 array}, scaled so that it has the effect of the tensors' or the settings' alpha."""
    state: dict[str, FloatArray] = {}
    for layer in sorted({name.rpartition(".lora_")[0] for name in tensors} - {""}):
        pair = {f"{layer}.lora_{part}.weight": tensors.get(f"{layer}.lora_{part}.weight") for part in "AB"}
        if missing := [name for name, tensor in pair.items() if tensor is None]:
            raise ValueError(f"lacks {missing[0]}")
        arrays = {name: tensor.float().numpy() for name, tensor in pair.items() if tensor is not None}
        rank = next(len(array) for array in arrays.values())
        if rank != config.rank:
            raise ValueError(
                f"has rank {rank} in {layer}, but lora.rank is {config.rank}; give --set lora.rank={rank}, if all "
                "layers have this rank"
            )
        own = tensors[f"{layer}.alpha"].item() if f"{layer}.alpha" in tensors else settings.get("lora_alpha", rank)
        alpha = _positive(own, "lora_alpha")
        state |= scale_lora(arrays, alpha / config.alpha)
    if overflown := [name for name, array in state.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{overflown[0]} times its alpha is not finite in float32")
    return state
