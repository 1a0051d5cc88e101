"""Checkpoints that are there whole or not at all, and exact resume.

A checkpoint is a folder `checkpoints/<iteration>/` with the learner's state and the adapter (`lora/`), written by the
learner, and `state.json`. Nothing else needs keeping: prompts and noise follow from the seed and the iteration.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LATEST = "LATEST"
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint: `iteration` iterations are done."""

    path: Path
    iteration: int


@contextmanager
def new_checkpoint(run: Path, iteration: int, keep: int) -> Iterator[str]:
    """A folder to fill, aside; at the end it is named, then named the latest, and all but the newest `keep` go."""
    folder = run / "checkpoints"
    aside, final = folder / f".{iteration:06d}.partial", folder / f"{iteration:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield str(aside.resolve())
    (aside / STATE).write_text(json.dumps({"iteration": iteration}) + "\n")
    shutil.rmtree(final, ignore_errors=True)  # of a run that went on from before it
    os.replace(aside, final)
    replace_text(folder / LATEST, final.name + "\n")
    for old in sorted(path for path in folder.iterdir() if path.name.isdigit())[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    _publish_adapter(final / "lora", run / "lora")


def _publish_adapter(source: Path, target: Path) -> None:
    aside = target.with_name(".lora.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def set_aside(run: Path) -> None:
    """Rename the folder of an earlier run with checkpoints to the first free <name>.1, <name>.2 ..."""
    if (run / "checkpoints").exists():
        numbered = (run.with_name(f"{run.name}.{number}") for number in itertools.count(1))
        run.rename(next(path for path in numbered if not path.exists()))


def find_checkpoint(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that `--resume` asks for: the run's latest (`auto`), none (`never`), or the one at a path.

    Raises:
        ValueError: one line; it is not there, or can't be read.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return read_checkpoint(Path(resume))
    latest = run / "checkpoints" / LATEST
    return read_checkpoint(latest.parent / latest.read_text().strip()) if latest.exists() else None


def read_checkpoint(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / STATE).read_text())
        return Checkpoint(path, int(state["iteration"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume: {path} is not a readable checkpoint ({type(error).__name__}: {error}); name a folder "
            "runs/<name>/checkpoints/<iteration>, or give --resume never to start again"
        ) from None


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    os.replace(aside, path)
