"""Checkpoints that are there whole or not at all, and exact resume.

A checkpoint is a folder `checkpoints/<iteration>/` with the learner's state and the adapter (`lora/`), written by the
learner, and `state.json` with the checksum of every file. Nothing else needs keeping: prompts and noise follow from the
seed and the iteration.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

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
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    digests = {path.relative_to(aside).as_posix(): _digest(path) for path in files}
    (aside / STATE).write_text(json.dumps({"iteration": iteration, "files": digests}) + "\n")
    shutil.rmtree(final, ignore_errors=True)  # of a run that went on from before it
    os.replace(aside, final)
    replace_text(folder / LATEST, final.name + "\n")
    for old in _finished(folder)[:-keep]:
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

    Where the latest is damaged, that is told and the one before it is taken.

    Raises:
        ValueError: one line; the one asked for, or every one there is, can't be used.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return read_checkpoint(Path(resume))
    damage: ValueError | None = None
    for folder in reversed(_finished(run / "checkpoints")):
        try:
            return read_checkpoint(folder)
        except ValueError as error:
            logger.warning("%s", error)
            damage = error
    if damage:
        raise damage
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every file of it as it was written."""
    try:
        state = json.loads((path / STATE).read_text())
        changed = [name for name, digest in state["files"].items() if _digest(path / name) != digest]
        if changed:
            raise ValueError(f"{changed[0]} is not as it was written")
        return Checkpoint(path, int(state["iteration"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume: {path} is not a readable checkpoint ({type(error).__name__}: {error}); name a folder "
            "runs/<name>/checkpoints/<iteration>, or give --resume never to start again"
        ) from None


def _finished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    os.replace(aside, path)
