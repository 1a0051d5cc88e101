"""One run, one lineage: where a run begins anew, all that it had written is set aside, never mixed with what follows.

It begins anew where it goes on from a checkpoint that is named, with other settings, or from the start. All that is
there moves to `set_aside/<n>/`; a copy of what came before the checkpoint stays. The copy is made first, in
`set_aside/next/`; then the intent is written; then files move, and each move can be done again. A process that is
killed on the way leaves the intent, and the next one finishes it before it looks for a checkpoint.

`changes.jsonl` has a line for each new beginning that the present lineage has behind it.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from g2rpo_ray.config.resume import Differences, describe, differences, judged_alike
from g2rpo_ray.record.checkpoint import (
    LATEST,
    STATE,
    Checkpoint,
    find_checkpoint,
    mark_checkpoints,
    publish_adapter,
    read_checkpoint,
    write_state,
)
from g2rpo_ray.record.lease import LEASE
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.record.tracking import parse_lines, to_json

CHANGES, METRICS = "changes.jsonl", "metrics.jsonl"
ASIDE, INTENT, NEXT = "set_aside", "set_aside/intent.json", "set_aside/next"
STAYS = (ASIDE, LEASE, "embeddings", "evaluation")  # of no lineage: caches, by content
NUMBERED = re.compile(r"(?:checkpoints|samples|samples/pictures|timeline)/(\d+)[./]")


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a run goes on from."""

    checkpoint: Checkpoint | None
    """None: the start."""
    anew: bool = False
    """Whether a lineage begins there."""
    changed: Differences = field(default_factory=dict)
    """Settings other than those that the checkpoint was made with, where a lineage begins."""
    named: str | None = None
    """The checkpoint that the command names, where it does."""

    @property
    def iteration(self) -> int:
        return self.checkpoint.iteration if self.checkpoint else 0

    def is_in(self, run: Folder) -> bool:
        """Whether it is a checkpoint that the run itself has made."""
        return self.checkpoint is not None and str(self.checkpoint.folder.parent.parent) == str(run)


def find_beginning(run: Folder, resume: str, settings: Mapping[str, Any]) -> Beginning:
    """Where a run goes on that is resumed with `resume`: auto, never, or a checkpoint's path or URI.

    A command that names a checkpoint and is given again goes on with the lineage that it began.

    Raises:
        ValueError: one line; no checkpoint can be used.
    """
    if resume == "never":
        return Beginning(None, anew=(run / "checkpoints").exists(LATEST))
    named = None if resume == "auto" else str(Folder(resume))
    latest, line = find_checkpoint(run), next(reversed(read_changes(run)), None)
    if latest is None and named is None:
        return Beginning(None)
    if latest is not None and (named is None or named == str(latest.folder) or (line and line["checkpoint"] == named)):
        changed = differences(latest.settings, settings)
        known = line["settings"] if line and line["iteration"] == latest.iteration else {}
        if json.dumps(changed) == json.dumps(known):
            return Beginning(latest)
        if named is None or named == str(latest.folder):
            return Beginning(latest, True, changed, named)
    checkpoint = read_checkpoint(Folder(resume))
    return Beginning(checkpoint, True, differences(checkpoint.settings, settings), named)


def begin_lineage(run: Folder, beginning: Beginning, config: str) -> Checkpoint | None:
    """Set aside what the run has written, but for what lies before the beginning, and write down why.

    Args:
        config: the content of the new config.yaml.

    Returns:
        The run's own copy of the checkpoint.
    """
    fresh, checkpoint, changed = run / NEXT, beginning.checkpoint, beginning.changed
    fresh.delete()
    before: list[dict[str, Any]] = []
    alike = False
    if checkpoint is not None:
        before, alike = _copy_before(checkpoint, fresh, changed)
    line = {
        "iteration": beginning.iteration,
        "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S UTC}",
        "checkpoint": beginning.named,
        "settings": changed,
        "judged_alike": alike,
        "set_aside": _free_place(run) if _own(run) else None,
    }
    fresh.write("config.yaml", config.encode())
    fresh.write(CHANGES, _to_lines([*before, line]))
    run.write(INTENT, to_json({"to": line["set_aside"], "moved": False}).encode())
    finish_beginning(run)
    if checkpoint is None:
        return None
    return replace(checkpoint, folder=run / "checkpoints" / f"{checkpoint.iteration:06d}")


def finish_beginning(run: Folder) -> None:
    """Do what an intent says, or what is left of it; nothing where there is none."""
    if not run.exists(INTENT):
        return
    intent = json.loads(run.read(INTENT))
    if not intent["moved"]:
        for name in _own(run):
            run.move(name, f"{intent['to']}/{name}")
        run.write(INTENT, to_json({**intent, "moved": True}).encode())
    for name in (run / NEXT).names():
        run.move(f"{NEXT}/{name}", name)
    run.delete(INTENT)


def read_changes(run: Folder) -> list[dict[str, Any]]:
    """The lines of changes.jsonl."""
    return parse_lines(run.read(CHANGES).decode()) if run.exists(CHANGES) else []


def judged_since(changes: Sequence[Mapping[str, Any]]) -> int:
    """The iteration after which held-out scores can be compared with all later ones: 0, or where judging changed."""
    return max((line["iteration"] for line in changes if not line["judged_alike"]), default=0)


def in_words(line: Mapping[str, Any]) -> str:
    """A line of changes.jsonl as a sentence."""
    since = f"iteration {line['iteration']}"
    parts = [f"since {since}: {describe(line['settings'])}"] if line["settings"] else []
    parts += [f"went on at {since} from {line['checkpoint']}"] if line["checkpoint"] else []
    parts += [f"what the run had written before is in {line['set_aside']}"] if line["set_aside"] else []
    return "; ".join(parts)


def _copy_before(checkpoint: Checkpoint, fresh: Folder, changed: Differences) -> tuple[list[dict[str, Any]], bool]:
    """Copy the checkpoint, and what the run that it is in wrote before it.

    Returns that run's earlier changes, and whether its held-out scores can be compared with what is to come.
    """
    last, folder = checkpoint.iteration, fresh / "checkpoints" / f"{checkpoint.iteration:06d}"
    source = checkpoint.folder.parent.parent
    before: list[dict[str, Any]] = []
    alike = False
    if str(source / "checkpoints" / folder.name) == str(checkpoint.folder):  # else it was copied from its run
        before = [line for line in read_changes(source) if line["iteration"] < last]
        alike = judged_alike(changed) and (source / "samples").exists(f"{judged_since(before):06d}.json")
        _copy_record(source, fresh, last, judged=alike)
    state = json.loads(checkpoint.folder.read(STATE))
    for file in checkpoint.folder.files():
        if file != STATE:
            checkpoint.folder.copy(file, folder)
    write_state(folder, state if alike else {**state, "score": None})
    mark_checkpoints(fresh / "checkpoints", last)
    publish_adapter(folder, fresh)
    return before, alike


def _copy_record(source: Folder, fresh: Folder, last: int, judged: bool) -> None:
    """Copy what a run wrote up to an iteration; `judged`: with checkpoints and held-out scores of the iterations."""
    for file in source.files():
        number = NUMBERED.match(file)
        wanted = int(number[1]) <= last if number else file.startswith("tensorboard/")
        if wanted and (judged or not file.startswith(("checkpoints/", "samples/"))):
            source.copy(file, fresh)
    if source.exists(METRICS):
        lines = parse_lines(source.read(METRICS).decode())
        fresh.write(METRICS, _to_lines([line for line in lines if line["iteration"] <= last]))


def _own(run: Folder) -> list[str]:
    """What belongs to the run's present lineage."""
    return [name for name in run.names() if name not in STAYS and not name.startswith(".")]


def _free_place(run: Folder) -> str:
    places = (f"{ASIDE}/{number}" for number in itertools.count(1))
    return next(place for place in places if not (run / place).names())


def _to_lines(objects: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(to_json(entry) + "\n" for entry in objects).encode()
