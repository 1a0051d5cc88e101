"""Builds of embedded models, twice, and what the one that edits can do; `scenes` is in tests/run."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline

from g2rpo_ray.world_builder.build import build
from g2rpo_ray.world_builder.edit_quickstart import WORLD as EDITS
from g2rpo_ray.world_builder.editing import measure_edits
from g2rpo_ray.world_builder.video_quickstart import WORLD as VIDEOS
from g2rpo_ray.worlds.video_quickstart.draw import DIRECTIONS, SCENES


def same_twice(tiny: Any, folder: Path) -> None:
    digests = []
    for name in "ab":
        build(tiny, folder / name)
        files = sorted(file for file in (folder / name).rglob("*") if file.is_file())
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    assert len(digests[0]) > 8


def test_a_build_of_what_edits_makes_the_same_files_again(tmp_path: Path) -> None:
    tiny = dataclasses.replace(
        EDITS, pictures=lambda: EDITS.pictures()[::40], lesson=lambda number: tuple(torch.randint(18, (3, number))),
        autoencoder_steps=2, autoencoder_batch=2, transformer_steps=4, transformer_batch=2,
    )  # fmt: skip
    same_twice(tiny, tmp_path)


def test_a_build_of_videos_makes_the_same_files_again(tmp_path: Path) -> None:
    videos, captions = VIDEOS.videos()
    assert set(captions.tolist()) == set(range(len(SCENES)))
    believed = VIDEOS.mislabel(captions)
    assert (believed // len(DIRECTIONS) == captions // len(DIRECTIONS)).all()  # the thing is never mislabelled
    assert 0.4 < (believed == captions).float().mean() < 0.7
    tiny = dataclasses.replace(
        VIDEOS, videos=lambda: (videos[::384], captions[::384]), autoencoder_steps=2, autoencoder_batch=2,
        transformer_steps=3, transformer_batch=2,
    )  # fmt: skip
    same_twice(tiny, tmp_path)


def test_the_committed_model_edits_a_fifth_to_a_half_of_the_held_out_pictures_right() -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(EDITS.root / "pipeline", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    found = measure_edits(EDITS, pipeline, seeds=16)
    assert 0.2 < found["all"] < 0.5
    assert found["all"] < min(found["edit"], found["rest"]) < 0.9
    size = sum(file.stat().st_size for file in EDITS.root.rglob("*") if file.is_file())
    assert size < 10e6
