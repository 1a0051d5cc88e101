"""Tiny pipelines of each family, loaded."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.models import (
    FlowModel,
    lora_state,
)
from g2rpo_ray.models.base import FAMILIES
from g2rpo_ray.types import PromptEmbedding
from tests.support.tiny_models import write_tiny

PROMPTS = ["a red cat", "two blue dogs on a very long green sofa", "7"]

SCALE = 2.5

DISTILLED = ("flux", "flux2")

TEXT_FAMILIES = sorted({*FAMILIES.values()} - {"flux_kontext", "qwen_image_edit_plus"})
"""Those that draw from a text alone; see tests/run/test_editing.py for the others."""


@functools.cache
def tiny(family: str) -> Path:
    return write_tiny(family, Path(FOLDER.name) / family)


FOLDER = tempfile.TemporaryDirectory()


def settings(family: str, **changes: Any) -> ModelConfig:
    large = family.startswith(("lumina2", "qwen_image_21", "wan"))  # eight pixels to a latent, or sixteen
    # the chat templates of the others are longer than what is cut at 64, or it is the prompt alone that is cut
    length = 64 if family in ("flux", "sd3", "chroma", "qwen_image_21", "wan", "wan_5b", "wan_a14b") else None
    negative = {"flux2_klein": "", **dict.fromkeys(DISTILLED)}.get(family, "bad")
    values = {
        "path": str(tiny(family)), "dtype": "float32", "height": 32 if large else 16, "width": 64 if large else 24,
        "guidance_scale": SCALE, "negative_prompt": negative, "max_sequence_length": length,
    }  # fmt: skip
    return ModelConfig(**values | changes)


def load(family: str, **changes: Any) -> FlowModel:
    torch.set_num_threads(1)
    return FlowModel.load(settings(family, **changes), "cpu", vae=True, transformer=True, text_encoders=True)


@functools.cache
def loaded(family: str) -> FlowModel:
    return load(family)


@functools.cache
def embeddings(family: str) -> tuple[list[PromptEmbedding], PromptEmbedding | None]:
    model, negative = loaded(family), settings(family).negative_prompt
    return model.encode(PROMPTS), None if negative is None else model.encode([negative], negative=True)[0]


def pipeline(family: str, lora: Path | None = None) -> Any:
    made = loaded(family).pipeline_class.from_pretrained(tiny(family))
    made.set_progress_bar_config(disable=True)
    if lora:
        made.load_lora_weights(lora)
    return made


def random_state(model: FlowModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    state = lora_state(model.transformer)
    return {name: rng.normal(0, 0.2, array.shape).astype(np.float32) for name, array in state.items()}


RUN = {
    "iterations": 2, "sampler.shift": "pipeline", "model.max_sequence_length": "null", "lora.targets": "null",
    "model.guidance_scale": SCALE, "evaluation.seeds": 1, "learner.gradient_checkpointing": "true",
}  # fmt: skip


def run_settings(family: str, folder: Path) -> dict[str, Any]:
    """Of a run on the family's tiny pipeline, with prompts of unlike length in `folder`."""
    config = settings(family)
    negative = "null" if config.negative_prompt is None else f"'{config.negative_prompt}'"
    texts = {"train": ["a red cat", "two blue dogs on a green sofa"], "heldout": ["7"]}
    for name, prompts in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    given = RUN | {
        "model.path": config.path, "model.height": config.height, "model.width": config.width,
        "model.negative_prompt": negative, "data.train_prompts": folder / "train.txt",
        "data.heldout_prompts": folder / "heldout.txt", "rewards.preference.kind": "jpeg_compressibility",
        "rewards.preference.options": "{}", "data.embeddings": folder / "embeddings",
    }  # fmt: skip
    return {key.replace(".", "__"): value for key, value in given.items()}
