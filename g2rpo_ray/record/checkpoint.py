"""Checkpoints that are there whole or not at all, and exact resume.

A checkpoint is a folder `checkpoints/<iteration>/` with the learner's state and the adapter (`lora/`), written by the
learner. `state.json`, written last, has the checksum of every file: without it, it is no checkpoint. That holds on
object storage, too, where folders can't be renamed. Nothing else needs keeping: prompts and noise follow from the seed
and the iteration.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from g2rpo_ray.record.storage import Folder

logger = logging.getLogger(__name__)

LATEST, BEST = "LATEST", "BEST"  # name the newest checkpoint, and the one with the best held-out scores
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint: `iteration` iterations are done."""

    folder: Folder
    iteration: int
    settings: dict[str, Any]
    """What it was made with."""
    budget: dict[str, Any] | None = None
    """What `auto` had chosen: see `g2rpo_ray.rollout.budget`."""


def new_checkpoint(run: Folder, iteration: int) -> Folder:
    """An empty folder for the checkpoint after `iteration` iterations."""
    folder = run / "checkpoints" / f"{iteration:06d}"
    folder.delete(STATE)  # first: from now on it is none
    folder.delete()
    return folder


def finish_checkpoint(
    run: Folder, iteration: int, files: Mapping[str, str], keep: int, settings: Mapping[str, Any],
    score: float | None = None, budget: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Make the folder that was filled a checkpoint; all but the newest `keep` and the best go.

    Args:
        files: SHA-256 of every file, by name, as they were written.
        settings: what it was made with.
        score: the higher the better; None where nothing was evaluated.
        budget: what `auto` has chosen.
    """
    checkpoints = run / "checkpoints"
    folder = checkpoints / f"{iteration:06d}"
    state = {"iteration": iteration, "score": score, "settings": settings, "budget": budget, "files": dict(files)}
    write_state(folder, state)
    finished, best = mark_checkpoints(checkpoints, iteration)
    for name in set(finished[:-keep]) - {best}:
        (checkpoints / name).delete(STATE)
        (checkpoints / name).delete()
    publish_adapter(folder, run)


def publish_best(run: Folder) -> int | None:
    """Make the adapter of the best checkpoint the run's own; its iteration, or None where there is no best one."""
    checkpoints = run / "checkpoints"
    if not checkpoints.exists(BEST):
        return None
    best = checkpoints.read(BEST).decode().strip()
    publish_adapter(checkpoints / best, run)
    return int(best)


def write_state(folder: Folder, state: Mapping[str, Any]) -> None:
    """Make a folder that is filled a checkpoint."""
    folder.write(STATE, (json.dumps(state) + "\n").encode())


def mark_checkpoints(checkpoints: Folder, newest: int) -> tuple[list[str], str | None]:
    """Let LATEST name the newest checkpoint and BEST the best one, if any was judged.

    Returns all up to the newest, and the best. A later one was found damaged, and will be written again.
    """
    finished = [name for name in _finished(checkpoints) if int(name) <= newest]
    scores = {name: _score(checkpoints / name) for name in finished}
    best = max(reversed(finished), key=lambda name: scores[name])  # of equals the newest
    checkpoints.write(LATEST, f"{finished[-1]}\n".encode())
    if scores[best] == -math.inf:
        return finished, None
    checkpoints.write(BEST, f"{best}\n".encode())
    return finished, best


def publish_adapter(checkpoint: Folder, run: Folder) -> None:
    """Make the checkpoint's adapter, and its average, the run's."""
    for kind in ("lora", "lora_ema"):
        for name in (checkpoint / kind).names():
            (run / kind).write(name, (checkpoint / kind).read(name))


def find_checkpoint(run: Folder) -> Checkpoint | None:
    """The run's latest checkpoint. Where that is damaged, it is told and the one before it is taken.

    Raises:
        ValueError: one line; every one that there is is damaged.
    """
    damage: ValueError | None = None
    for name in reversed(_finished(run / "checkpoints")):
        try:
            return read_checkpoint(run / "checkpoints" / name)
        except ValueError as error:
            logger.warning("%s", error)
            damage = error
    if damage:
        raise damage
    return None


def read_checkpoint(folder: Folder) -> Checkpoint:
    """The checkpoint in a folder, every file of it as it was written."""
    try:
        state = json.loads(folder.read(STATE))
        found = folder.digests()
        changed = [name for name, digest in state["files"].items() if found.get(name) != digest]
        if changed:
            raise ValueError(f"{changed[0]} is not as it was written")
        return Checkpoint(folder, int(state["iteration"]), dict(state["settings"]), state.get("budget"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume: {folder} is not a readable checkpoint ({type(error).__name__}: {error}); name a folder "
            "runs/<name>/checkpoints/<iteration>, or give --resume never to start again"
        ) from None


def _finished(checkpoints: Folder) -> list[str]:
    """Names of the checkpoints, oldest first; what a killed run left half written is none."""
    return [name for name in checkpoints.names() if name.isdigit() and (checkpoints / name).exists(STATE)]


def _score(folder: Folder) -> float:
    try:
        score = json.loads(folder.read(STATE))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf
    return -math.inf if score is None else float(score)
