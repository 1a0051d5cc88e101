"""Checkpoints, each complete or absent, and exact resume.

A checkpoint is a folder `checkpoints/<iteration>/` with the learner's state and the adapter (`lora/`), written by the
learner. `state.json`, written last, has the checksum of every file; a folder without it is no checkpoint. This works on
object storage as well, which cannot rename folders. Nothing else is saved: prompts and noise follow from the seed and
the iteration.

`LATEST`, `BEST` and the adapter in the run's `lora/` follow from the checkpoints. `settle_checkpoints` is idempotent: a
run calls it after each checkpoint and at each start, since the process before may have been killed at any point.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from g2rpo_ray.runs.storage import Folder

logger = logging.getLogger(__name__)

LATEST, BEST = "LATEST", "BEST"  # name the newest checkpoint, and the one with the best held-out scores
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint after `iteration` iterations."""

    folder: Folder
    iteration: int
    settings: dict[str, Any]
    """The settings that it was made with."""
    budget: dict[str, Any] | None = None
    """The state of `auto`: see `g2rpo_ray.rollout.auto`."""


def new_checkpoint(run: Folder, iteration: int) -> Folder:
    """An empty folder for the checkpoint after `iteration` iterations."""
    folder = _folder(run, iteration)
    folder.delete(STATE)  # first, so that it is no checkpoint from now on
    folder.delete()
    return folder


def finish_checkpoint(
    run: Folder, iteration: int, files: Mapping[str, str], keep: int, settings: Mapping[str, Any],
    score: float | None = None, budget: Mapping[str, Any] | None = None, evaluated: bool = False,
    stopped: bool = False,
) -> int:  # fmt: skip
    """Turn a filled folder into a checkpoint; deletes all but the newest `keep` and the best.

    Args:
        files: SHA-256 of every file, by name, as they were written.
        settings: the settings that it was made with.
        score: higher is better; None if there is no score to compare.
        budget: the state of `auto`.
        evaluated: whether the held-out evaluation that was due is finished.
        stopped: see `settle_checkpoints`.

    Returns:
        The iteration whose adapter is now in the run's `lora/`.
    """
    state = {"iteration": iteration, "score": score, "evaluated": evaluated, "settings": settings, "budget": budget}
    _write_state(_folder(run, iteration), {**state, "files": dict(files)})
    return settle_checkpoints(run, iteration, keep, stopped)


def is_evaluated(run: Folder, iteration: int) -> bool:
    """Whether the checkpoint exists and was evaluated."""
    folder = _folder(run, iteration)
    if not folder.exists(STATE):
        return False
    # earlier versions did not write this key
    return bool(json.loads(folder.read(STATE)).get("evaluated", (run / "samples").exists(f"{iteration:06d}.json")))


def judge_checkpoint(run: Folder, iteration: int, score: float | None, keep: int, stopped: bool) -> int:
    """Record the score of a checkpoint whose evaluation was interrupted; returns as `finish_checkpoint`."""
    folder = _folder(run, iteration)
    _write_state(folder, {**json.loads(folder.read(STATE)), "score": score, "evaluated": True})
    return settle_checkpoints(run, iteration, keep, stopped)


def settle_checkpoints(run: Folder, newest: int, keep: int, stopped: bool = False) -> int:
    """Make `LATEST`, `BEST` and `lora/` agree with the checkpoints, and delete old ones. Idempotent.

    Args:
        newest: iteration of the newest usable checkpoint; 0 if there is none.
        keep: number of the newest checkpoints to keep, besides the best.
        stopped: whether the hacking panel ended the run; then `lora/` becomes the best adapter, else the newest.

    Returns:
        The iteration whose adapter is now in the run's `lora/`; 0 if there is none.
    """
    checkpoints = run / "checkpoints"
    published = f"{newest:06d}"
    if newest:
        finished, best = _mark(checkpoints, newest)
        for name in set(finished[:-keep]) - {best}:
            (checkpoints / name).delete(STATE)
        published = best if stopped and best else published
    for name in set(_numbered(checkpoints)) - set(finished_checkpoints(run)):
        (checkpoints / name).delete()
    if newest:
        for kind in ("lora", "lora_ema"):  # the adapter, and its average
            for name in (checkpoints / published / kind).names():
                _write_if_changed(run / kind, name, (checkpoints / published / kind).read(name))
    return int(published)


def _write_state(folder: Folder, state: Mapping[str, Any]) -> None:
    """Turn a filled folder into a checkpoint."""
    folder.write(STATE, (json.dumps(state) + "\n").encode())


def _mark(checkpoints: Folder, newest: int) -> tuple[list[str], str | None]:
    """Write LATEST, and BEST if any checkpoint has a score.

    Returns the names up to the newest, and the best. Later checkpoints are damaged and will be written again.
    """
    finished = [name for name in finished_checkpoints(checkpoints.parent) if int(name) <= newest]
    scores = {name: _score(checkpoints / name) for name in finished}
    best = max(reversed(finished), key=lambda name: scores[name])  # the newest of equal ones
    _write_if_changed(checkpoints, LATEST, f"{finished[-1]}\n".encode())
    if scores[best] == -math.inf:
        checkpoints.delete(BEST)
        return finished, None
    _write_if_changed(checkpoints, BEST, f"{best}\n".encode())
    return finished, best


def find_checkpoint(run: Folder, most: int | None = None) -> Checkpoint | None:
    """The run's latest checkpoint with at most `most` iterations; None if there is none.

    If it is damaged, logs a warning and uses the one before.

    Raises:
        ValueError: all of them are damaged.
    """
    damage: ValueError | None = None
    for name in reversed(finished_checkpoints(run)):
        if most is not None and int(name) > most:
            continue
        try:
            return read_checkpoint(run / "checkpoints" / name)
        except ValueError as error:
            logger.warning("%s", error)
            damage = error
    if damage:
        raise damage
    return None


def best_checkpoint(run: Folder) -> Checkpoint | None:
    """The checkpoint with the best held-out scores; None if none has any, or if it is damaged, with a warning."""
    checkpoints = run / "checkpoints"
    if not checkpoints.exists(BEST):
        return None
    try:
        return read_checkpoint(checkpoints / checkpoints.read(BEST).decode().strip())
    except ValueError as error:
        logger.warning("%s", error)
        return None


def read_checkpoint(folder: Folder) -> Checkpoint:
    """Read and verify the checkpoint in a folder.

    Raises:
        ValueError: it is no checkpoint, or a file of it was changed.
    """
    try:
        state = json.loads(folder.read(STATE))
        found = folder.digests()
        changed = [name for name, digest in state["files"].items() if found.get(name) != digest]
        if changed:
            raise ValueError(f"{changed[0]} was changed")
        return Checkpoint(folder, int(state["iteration"]), dict(state["settings"]), state.get("budget"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume: {folder} is not a readable checkpoint ({type(error).__name__}: {error}); name a folder "
            "runs/<name>/checkpoints/<iteration>, or start another run by another --name"
        ) from None


def finished_checkpoints(run: Folder) -> list[str]:
    """Names of the checkpoints, oldest first; ignores folders without state.json."""
    checkpoints = run / "checkpoints"
    return [name for name in _numbered(checkpoints) if (checkpoints / name).exists(STATE)]


def _numbered(checkpoints: Folder) -> list[str]:
    return [name for name in checkpoints.names() if name.isdigit()]


def _write_if_changed(folder: Folder, file: str, content: bytes) -> None:
    if not folder.exists(file) or folder.read(file) != content:
        folder.write(file, content)


def _folder(run: Folder, iteration: int) -> Folder:
    return run / "checkpoints" / f"{iteration:06d}"


def _score(folder: Folder) -> float:
    try:
        score = json.loads(folder.read(STATE))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf
    return -math.inf if score is None else float(score)
