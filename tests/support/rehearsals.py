"""Rehearsals of the package's configurations, in a process that is not the tests' own: DeepSpeed stays in it."""

import contextlib
import io
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from g2rpo_ray.commands.rehearse import rehearse
from g2rpo_ray.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
COMMON = ("quickstart", "flux2_klein_edit")
"""Rehearsed in `make test`; CI rehearses all."""
CHEAP = ("evaluation.seeds=1", "model.dtype=float32")
FEWER = {True: "sampler.group_size=3", False: "sampler.roots=4"}  # images to compare: siblings, or chains


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _needs_pictures(file: Path) -> bool:
    return str(load_config(file).data.train_prompts).startswith("edits/")


def _rehearsed(file: Path, folder: Path, given: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether nothing was wrong, and what was printed."""
    config = load_config(file)
    fewer = FEWER[config.sampler.group_size > 1]
    prompts = f"data.prompts_per_iteration={config.learner.updates_per_rollout}"
    config = load_config(file, [*CHEAP, fewer, prompts, *given])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fine = rehearse(config, folder, local=True)
    return fine, printed.getvalue()


def _pictures_are_missed(file: Path, process: ProcessPoolExecutor, folder: Path) -> None:
    fine, printed = process.submit(_rehearsed, file, folder).result()
    assert not fine
    assert "problem:       data.heldout_prompts: cannot read edits/" in printed


def _edits_are_rehearsed(file: Path, process: ProcessPoolExecutor, folder: Path) -> None:
    """With six pictures, at a small size."""
    (folder / "edits").mkdir()
    for number in range(6):
        Image.new("RGB", (96, 64), (40 * number, 90, 10)).save(folder / "edits" / f"{number}.png")
    rows = [json.dumps({"prompt": f"make it {number} times as red", "source": f"{number}.png"}) for number in range(6)]
    for name, part in (("train", rows[:4]), ("heldout", rows[4:])):
        (folder / "edits" / f"{name}.jsonl").write_text("\n".join(part))
    given = [f"data.{name}_prompts={folder}/edits/{name}.jsonl" for name in ("train", "heldout")]
    fine, printed = process.submit(_rehearsed, file, folder / "twin", given).result()
    assert fine, printed
    assert "model.source_area 4096 (None)" in printed


def _nothing_is_wrong(file: Path, process: ProcessPoolExecutor, folder: Path) -> None:
    fine, printed = process.submit(_rehearsed, file, folder).result()
    assert fine, printed
    assert "\nrehearsed:     2 iterations of " in printed
    assert "problem:" not in printed
    config = load_config(file)
    on_the_hub = not config.model.is_local  # as its rewards are
    assert printed.count("\nstand-in:") == (len(config.rewards) if on_the_hub else 0)
    assert list((folder / config.name / "lora").glob("*.safetensors"))


def cases(common: bool) -> list[object]:
    """Checks of the common configurations or of all others, each with a file."""
    found = []
    for file in sorted(CONFIGS.glob("*.yaml")):
        pictures = [_pictures_are_missed, _edits_are_rehearsed]
        for check in pictures if _needs_pictures(file) else [_nothing_is_wrong]:
            if (file.stem in COMMON) == common:
                found.append(pytest.param(check, file, id=f"{file.stem}{check.__name__}"))
    return found
