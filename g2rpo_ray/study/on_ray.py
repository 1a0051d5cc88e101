"""A run of a study on a Ray cluster, by `g2rpo_ray.run`, which resumes from its own checkpoint."""

import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from g2rpo_ray.config import dump_config
from g2rpo_ray.exits import INTERRUPTED
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.rollout.cost import affordable
from g2rpo_ray.runs.reader import Run, read_run
from g2rpo_ray.runs.storage import Folder, replace_text
from g2rpo_ray.study.plan import Case
from g2rpo_ray.study.record import REFUSED, Curve, Line, picture_file, save_pictures


class Commands:
    """The running processes, so that all of them can be terminated."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._starting = threading.Lock()

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Runs a process; returns its exit status and stderr.

        It has its own session, so that Ctrl-C in a terminal does not reach it: with `end` it would be a second signal.

        Raises:
            KeyboardInterrupt: `end` was called.
        """
        with self._starting:
            if self._ended:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            self._running.add(process)
        _, errors = process.communicate()
        self._running.discard(process)
        if self._ended:
            raise KeyboardInterrupt
        return process.returncode, errors

    def end(self) -> None:
        """Sends SIGTERM to all processes: the first time they save and end, the second time they end at once."""
        with self._starting:
            self._ended = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


def run_on_ray(folder: Path, address: str | None, commands: Commands, case: Case) -> list[Line]:
    """Does a run in its own directory; an interrupted run resumes from its checkpoint."""
    if case.kind == "base":  # each run evaluates it
        return []
    file, place = folder / "configs" / f"{case.key}.yaml", Folder(case.config.output) / case.key
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "g2rpo_ray.run", "--config", str(file)]
    command += ["--address", address] if address else []
    train, run = read_run_prompts(case.config).train, read_run(str(place)) if place.exists("config.yaml") else None
    ended = False
    while True:  # with `auto`, which may cost less than planned, several times
        lines = run.lines[1:] if run else []
        more = affordable(case.config, train, case.budget - _cost(lines), len(lines))
        if run and ended and not more:
            return _lines_of(case, run, folder, place)
        done = len(lines) + more
        replace_text(file, dump_config(case.config.model_copy(update={"iterations": done})))
        status, errors = commands.run(command)
        if REFUSED in errors:
            return [Curve(case).line(failed=REFUSED)]
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            raise RuntimeError(f"{case.words}: {(errors.strip() or f'exit status {status}').splitlines()[-1]}")
        run, ended = read_run(str(place)), True


def _cost(lines: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(line[key] for line in lines for key in ("rollout/evaluations", "learner/evaluations")))


def _lines_of(case: Case, run: Run, folder: Path, place: Folder) -> list[Line]:
    """The lines of the base and of a finished run, from its directory."""
    from g2rpo_ray.models import manifest_of, read_lora

    curve, base, lines = Curve(case), Curve(case.of_base()), run.lines[1:]
    base.look(0, 0, 0, run.evaluations[0].scores)
    for done, line in enumerate(lines, 1):
        curve.iteration({name: value for name, value in line.items() if value is not None})
        if found := run.evaluations.get(done):
            phases = [f"timing_s/{phase}" for phase in ("rollout", "update", "broadcast")]
            seconds = sum(line.get(phase) or 0.0 for line in lines[:done] for phase in phases)
            curve.look(done, _cost(lines[:done]), seconds, found.scores)
    for at, shown in ((0, case.of_base()), (run.done, case)):
        if shown.shown:
            save_pictures(picture_file(folder, shown.key), run.evaluations[at].pictures)
    with (place / "lora").reading() as path:
        adapter = manifest_of(read_lora(str(path), case.config.lora), 0).checksum
    mismatch = float(run.series("mismatch/velocity")[1].max(initial=0.0))
    named = {"evaluations": "rollout/evaluations", "states": "learner/states", "updates": "learner/evaluations"}
    counts = {name: int(sum(line[key] for line in lines)) for name, key in named.items()}
    return [base.line(), curve.line(**counts, mismatch_velocity=mismatch, adapter=adapter)]
