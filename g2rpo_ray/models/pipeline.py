"""A diffusers pipeline on disk or on the hub: its configuration files, and loading of its parts."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.paths import resolve

SECOND = "transformer_2"  # of a pipeline with a network for low noise
NOT_TEXT = ("transformer", SECOND, "vae", "scheduler")
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([^.-]+))?(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, slots=True)
class Description:
    """The content of a pipeline's configuration files."""

    kind: str  # the pipeline's class
    parts: tuple[str, ...]  # names of its parts
    network: Mapping[str, Any]  # the transformer's configuration
    autoencoder: Mapping[str, Any]

    @property
    def text_parts(self) -> list[str]:
        """Text encoders, tokenizers and other parts that make embeddings."""
        return [part for part in self.parts if part not in NOT_TEXT]


def describe_pipeline(config: ModelConfig, kinds: Sequence[str]) -> Description:
    """Reads the configuration files of a pipeline of one of these kinds.

    Raises:
        ValueError: one line; there is no pipeline, or it is of another kind.
    """
    path, revision = resolve(config.path), config.revision
    with loading(config):
        if Path(path).is_absolute() and not Path(path).is_dir():  # diffusers' message would mention the hub
            raise ValueError("no such directory")
        index = DiffusionPipeline.load_config(path, revision=revision)
        kind = index.get("_class_name")
        if kind not in kinds:
            raise ValueError(f"it is a {kind}; supported are {', '.join(kinds)}")
        parts = tuple(name for name, value in index.items() if is_part(value) and value[0] is not None)
        encoders = [part for part in parts if (Path(path) / part / "config.json").is_file() and part not in NOT_TEXT]
        settings = {  # any class of models reads config.json
            part: AutoencoderKL.load_config(path, subfolder=part, revision=revision)
            for part in ("transformer", "vae", *encoders)
        }
    for part, given in settings.items():
        if quantized := given.get("quantization_config"):
            raise ValueError(
                f"model.path: {config.path} is saved with quantized weights ({_quantization(quantized)}) in {part}; "
                "give the original pipeline, such as in bfloat16"
            )
    network, autoencoder = settings["transformer"], settings["vae"]
    return Description(kind, parts, network, autoencoder)


def is_part(value: Any) -> bool:
    """True if an entry of model_index.json is a part, [library, class] or nulls, and not a setting."""
    return isinstance(value, list) and all(name is None or isinstance(name, str) for name in value)


def _quantization(settings: Any) -> str:
    """The method, such as `bitsandbytes, load_in_4bit`."""
    known = settings if isinstance(settings, dict) else {}
    bits = [key for key, value in known.items() if key.startswith("load_in_") and value is True]
    return ", ".join([str(known.get("quant_method", "unknown method")), *bits])


def _only_variant(path: Path, parts: Sequence[str]) -> str | None:
    """The variant, such as fp16, of a local pipeline if a part has weights in this variant only."""
    for part in parts:
        files = (path / part).iterdir() if (path / part).is_dir() else ()
        variants = {found[1] for file in files if (found := WEIGHTS.fullmatch(file.name))}
        if variants and None not in variants:
            return min(variants)
    return None


def load_parts(
    kind: Any, config: ModelConfig, description: Description, parts: Sequence[str], optional: Sequence[str]
) -> Any:
    """A pipeline of this class with these parts, frozen, and its scheduler; other parts are None.

    Args:
        optional: parts that the pipeline may lack.

    Raises:
        ValueError: one line; a part is missing or cannot be read.
    """
    path, wanted = resolve(config.path), ["scheduler", *parts]
    with loading(config), torch.device("cpu"):  # a scheduler's constructor reads its tensors, which meta ones are not
        for part in wanted:  # without its folder diffusers would look for the part beside model_index.json
            if Path(path).is_dir() and not (Path(path) / part).is_dir():
                raise ValueError(f"it has no folder {part}")
        others = {part: None for part in (*description.parts, *optional) if part not in wanted}
        dtype = getattr(torch, config.dtype)
        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()  # of parts: it would be between a user and a line that says what is wrong
        variant = _only_variant(Path(path), description.parts)
        pipeline = kind.from_pretrained(path, revision=config.revision, variant=variant, dtype=dtype, **others)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


@contextmanager
def loading(config: ModelConfig) -> Iterator[None]:
    """Converts errors of diffusers, transformers and the hub to ValueError with one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        given = f"{config.path!r}" + (f" at revision {config.revision!r}" if config.revision else "")
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        raise ValueError(
            f"model.path: cannot load {given}; expected a diffusers pipeline, a directory with model_index.json "
            "and a folder for each part, or its id on the Hugging Face hub; check the path, or download it "
            f"where the hub can be reached and give that directory ({reason})"
        ) from None


def check_size(config: ModelConfig, multiple: int) -> None:
    for key, size in (("height", config.height), ("width", config.width)):
        if size % multiple:
            below = max(multiple, size - size % multiple)
            raise ValueError(
                f"model.{key}: {size} given; must be a multiple of {multiple} for this pipeline, "
                f"e.g. {below} or {below + multiple}"
            )


def check_frames(config: ModelConfig, group: int | None, kind: str) -> None:
    """Raises ValueError unless a pipeline of this kind makes so many frames: 1, or 1 and whole groups."""
    if group is None and config.frames != 1:
        raise ValueError(f"model.frames: {config.frames} given; a {kind} makes images; remove it")
    if group is not None and (config.frames - 1) % group:
        below = config.frames - (config.frames - 1) % group
        raise ValueError(
            f"model.frames: {config.frames} given; a {kind} makes 1 + {group}n frames, e.g. {below} or {below + group}"
        )


def set_attention_backend(transformer: Any, backend: str) -> None:
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"model.attention_backend: {backend!r} given; not usable on this machine: {reason}") from None
