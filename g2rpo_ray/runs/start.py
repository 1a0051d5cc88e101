"""The start of a run: from the beginning, its own latest checkpoint, or a checkpoint of another run.

A run directory holds one configuration. Other settings and earlier checkpoints need a run of another name, which
copies the checkpoint that it starts from. `resumed_from.json` is written first, the copy's `state.json` last. A process
that is killed in between leaves no checkpoint, and the next one copies again.
"""

import json
import shutil
from collections.abc import Mapping
from typing import Any

from g2rpo_ray.config.resume import changes_in_words, differences
from g2rpo_ray.messages import one_line, shown
from g2rpo_ray.paths import place_fault
from g2rpo_ray.runs.audit import AUDIT
from g2rpo_ray.runs.checkpoint import (
    STATE,
    Checkpoint,
    find_checkpoint,
    finish_checkpoint,
    finished_checkpoints,
    new_checkpoint,
    read_checkpoint,
)
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.runs.tracking import read_json, to_json

METRICS, ORIGIN = "metrics.jsonl", "resumed_from.json"
SOURCES = "sources.png"  # in samples/pictures
Origin = Mapping[str, Any]
"""Content of ORIGIN: `checkpoint`, its `iteration`, and the `settings` that differ: {key: [before, now]}."""


def find_start(run: Folder, resume: str, settings: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint that a run starts from, None for the beginning.

    Args:
        resume: `auto`, `never`, or the folder of a checkpoint. A command that names one may be repeated: it resumes the
            run that it started.
        settings: of the configuration, as `g2rpo_ray.config.resume.settings` makes them.

    Raises:
        ValueError: the run has other settings or has passed the checkpoint, or a checkpoint is damaged.
    """
    if resume == "never":
        if finished_checkpoints(run):
            raise ValueError(f"--resume never: {run} already has checkpoints; choose another --name")
        return None
    if resume != "auto" and (fault := place_fault(resume)):
        raise ValueError(f"--resume: {shown(resume)} given; {fault}")
    latest, origin = find_checkpoint(run), read_origin(run)
    started_from = origin["checkpoint"] if origin else None
    named = started_from if resume == "auto" else str(Folder(resume))
    start = read_checkpoint(Folder(named)) if latest is None and named else latest
    if latest and named not in (started_from, str(latest.folder)):
        raise ValueError(
            f"--resume: {run} has its own checkpoints, up to {latest.folder.name}; choose another --name to "
            f"start from {named}"
        )
    if start and start.iteration > settings["iterations"]:
        raise ValueError(
            f"iterations: {settings['iterations']} given, but {start.iteration} are finished: set more, or start from "
            f"an earlier checkpoint, --resume {start.folder.parent}/<iteration> under another --name"
        )
    if latest and (changed := differences(latest.settings, settings)):
        raise ValueError(
            f"--resume: {run} has other settings: {changes_in_words(changed)}; choose another --name, and add "
            f"--resume {latest.folder} to start from its checkpoint"
        )
    return start


def is_own(run: Folder, checkpoint: Checkpoint | None) -> bool:
    """Whether the checkpoint is the run's own, so that nothing is copied."""
    return checkpoint is None or str(checkpoint.folder.parent.parent) == str(run)


def begin(run: Folder, checkpoint: Checkpoint | None, settings: Mapping[str, Any]) -> Checkpoint | None:
    """Prepare the run directory for a start from `checkpoint`; returns the run's own copy of it."""
    if checkpoint is None or is_own(run, checkpoint):
        if checkpoint is None:
            run.delete(ORIGIN)
        return checkpoint
    for name in ("samples", "timeline", "tensorboard"):  # of an earlier start without a checkpoint
        (run / name).delete()
    for name in (METRICS, AUDIT):
        run.delete(name)
    iteration, changed = checkpoint.iteration, differences(checkpoint.settings, settings)
    origin = {"checkpoint": str(checkpoint.folder), "iteration": iteration, "settings": changed}
    run.write(ORIGIN, to_json(origin).encode())
    copy, files = new_checkpoint(run, iteration), json.loads(checkpoint.folder.read(STATE))["files"]
    with checkpoint.folder.reading() as source, copy.writing() as target:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(STATE), dirs_exist_ok=True)
    finish_checkpoint(run, iteration, files, 1, settings, budget=checkpoint.budget)
    return read_checkpoint(copy)


def read_origin(run: Folder) -> Origin | None:
    """The checkpoint that the run was resumed from; None if it started at the beginning."""
    return read_json(run, ORIGIN) if run.exists(ORIGIN) else None


def first_iteration(run: Folder) -> int:
    """The iteration at which the run started. Held-out scores are compared with those at that time."""
    origin = read_origin(run)
    return int(origin["iteration"]) if origin else 0


def origin_in_words(origin: Origin) -> str:
    """The origin as a clause, in one line."""
    changed = f" with other settings: {changes_in_words(origin['settings'])}" if origin["settings"] else ""
    return one_line(f"resumed from {origin['checkpoint']}{changed}", 1000)
