"""Source pictures for tests."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from g2rpo_ray.data.pictures import PictureFile, picture_file


def picture(width: int, height: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


WIDE, OTHER, TALL = picture(96, 64, 0), picture(96, 64, 1), picture(64, 80, 2)


def png(source: Image.Image) -> bytes:
    stream = io.BytesIO()
    source.save(stream, "PNG")
    return stream.getvalue()


def write_pictures(folder: Path) -> dict[str, PictureFile]:
    (folder / "pictures").mkdir()
    for name, one in {"wide": WIDE, "other": OTHER, "tall": TALL}.items():
        one.save(folder / "pictures" / f"{name}.png")
    return {name: picture_file(f"pictures/{name}.png", folder) for name in ("wide", "other", "tall")}


def run_settings(folder: Path, pipeline: Path) -> dict[str, Any]:
    """Of a guided run whose iterations have a prompt without source, and sources of unlike sizes."""
    write_pictures(folder)
    rows = [
        {"prompt": text, **({"source": [f"pictures/{name}.png" for name in names]} if names else {})}
        for text, names in (
            ("make it red", ["wide"]), ("make it red", ["other"]), ("two blue dogs", ["tall"]), ("7", []),
            ("held out", ["wide"]),
        )
    ]  # fmt: skip
    for name, part in {"train": rows[:4], "heldout": rows[4:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    return {
        "iterations": 2, "seed": 1, "model__path": pipeline, "model__sources": 1, "model__height": 16,
        "model__width": 24, "model__negative_prompt": "''", "model__guidance_scale": 2.5,
        "data__train_prompts": folder / "train.jsonl", "data__heldout_prompts": folder / "heldout.jsonl",
        "data__prompts_per_iteration": 4, "data__embeddings": folder / "embeddings", "lora__targets": "null",
        "rewards__preference__kind": "jpeg_compressibility", "rewards__preference__options": "{}",
        "learner__micro_batch": 3, "learner__lr": 1e-3,
    }  # fmt: skip
