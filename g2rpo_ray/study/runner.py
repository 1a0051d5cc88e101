"""How a run of a study is done: in a process that does others after it, or by `g2rpo_ray.run` on a Ray cluster."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from g2rpo_ray.config import dump_config
from g2rpo_ray.launch.command import INTERRUPTED
from g2rpo_ray.launch.plan import affordable, state_cost
from g2rpo_ray.launch.preflight import read_run_prompts
from g2rpo_ray.record.storage import Folder, replace_text
from g2rpo_ray.report import Run, read_run
from g2rpo_ray.study.plan import Case
from g2rpo_ray.study.record import Curve, Line, picture_file, save_pictures

REFUSED = "learner: the gradient is not finite"  # the learning rate is too high: that is a result


FIRST_S = 6 * 3600.0  # until the first run of a study has ended here, before one is taken for hung
SHORTEST_S = 600.0
TIMES = 10.0  # as long as nothing ended before


class Workers:
    """Those who do the runs, some at a time."""

    def __init__(self, pool: Executor, bounded: bool):
        """`bounded`: whether their time is bounded here; a run on Ray has limits of its own."""
        self._pool, self._bounded = pool, bounded
        self._longest: float | None = None  # seconds from one end to the next

    def each(self, do: Callable[[Case], list[Line]], cases: Sequence[Case]) -> Iterator[tuple[Case, list[Line]]]:
        """What is done, as it comes.

        Raises:
            RuntimeError: a run failed, or none ended for so long that what is going on is taken for hung.
        """
        going, began = {self._pool.submit(do, case): case for case in cases}, time.monotonic()
        while going:
            ended, _ = wait(going, self.limit, FIRST_COMPLETED)
            spent, began = time.monotonic() - began, time.monotonic()
            if not ended:
                names = "; ".join(case.words for case in list(going.values())[:4])
                raise RuntimeError(f"no run ended for {spent:.0f} s, which is taken for hung; the next ones: {names}")
            self._longest = max(spent, self._longest or 0.0)
            for future in ended:
                yield going.pop(future), future.result()

    @property
    def limit(self) -> float | None:
        """Seconds that no run may end."""
        if not self._bounded:
            return None
        return FIRST_S if self._longest is None else max(SHORTEST_S, TIMES * self._longest)


@contextmanager
def workers(on: str, jobs: int) -> Iterator[Workers]:
    """Who does the runs, `jobs` at a time; left by an exception, what is going on ends."""
    others = set(multiprocessing.active_children())
    pool: Executor
    if on == "ray":
        pool = ThreadPoolExecutor(jobs)
    else:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, spawn, initializer=_begin)
    try:
        yield Workers(pool, bounded=on != "ray")
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # it has nothing to save, and may stand still
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def doing(on: str, folder: Path, address: str | None) -> Callable[[Case], list[Line]]:
    """A function from a case to the lines of the record that it gives."""
    return partial(_on_ray, folder, address) if on == "ray" else partial(_here, folder)


def _begin() -> None:
    """A worker is killed by its parent; where that is gone, it ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the machine's, which a kill leaves behind
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _here(folder: Path, case: Case) -> list[Line]:
    from g2rpo_ray.models import describe
    from g2rpo_ray.study.single import Single

    run, curve = Single(case.config), Curve(case)
    if case.kind == "base":
        judged = run.judge()
        curve.look(0, 0, 0, judged.scores)
        save_pictures(picture_file(folder, case.key), judged.pictures)
        return [curve.line()]
    ratio = 0.0
    try:
        for done, metrics, found in run.run(case.budget, case.looks):
            curve.iteration(metrics)
            ratio = max(ratio, metrics.get("actor/ratio_initial_max_dev", 0.0))
            if found:
                curve.look(done, run.cost, run.seconds, found.scores)
                judged = found
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        return [curve.line(failed=REFUSED)]
    if case.shown:
        save_pictures(picture_file(folder, case.key), judged.pictures)
    adapter = describe(run.engine.lora_state(), 0).checksum
    return [curve.line(evaluations=run.sampler.evaluations, states=run.states, ratio_initial_max_dev=ratio,
                       adapter=adapter)]  # fmt: skip


def _on_ray(folder: Path, address: str | None, case: Case) -> list[Line]:
    """The run's own directory has all; one that was interrupted goes on from its checkpoint."""
    if case.kind == "base":  # each run has evaluated it
        return []
    file, place = folder / "configs" / f"{case.key}.yaml", Folder(case.config.output) / case.key
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "g2rpo_ray.run", "--config", str(file)]
    command += ["--address", address] if address else []
    train, run = read_run_prompts(case.config).train, read_run(str(place)) if place.exists("config.yaml") else None
    ended = None
    while True:  # of `auto`, which may have been cheaper than it might, again and again
        lines = run.lines[1:] if run else []
        more = affordable(case.config, train, case.budget - _cost(case, lines), len(lines))
        if run and ended and not more:
            return _lines_of(case, run, folder, place)
        done = len(lines) + more
        replace_text(file, dump_config(case.config.model_copy(update={"iterations": done})))
        ended = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=False)
        if REFUSED in ended.stderr:
            return [Curve(case).line(failed=REFUSED)]
        if ended.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        if ended.returncode:
            raise RuntimeError(f"{case.words}: {ended.stderr.strip().splitlines()[-1]}")
        run = read_run(str(place))


def _cost(case: Case, lines: Sequence[Mapping[str, Any]]) -> float:
    evaluations, states = (sum(int(line[key]) for line in lines) for key in ("rollout/evaluations", "learner/states"))
    return evaluations + state_cost(case.config) * states


def _lines_of(case: Case, run: Run, folder: Path, place: Folder) -> list[Line]:
    """The lines of the base and of a finished run, from its directory."""
    from g2rpo_ray.models import describe, read_lora

    curve, base, lines = Curve(case), Curve(case.of_base()), run.lines[1:]
    base.look(0, 0, 0, run.evaluations[0].scores)
    for done, line in enumerate(lines, 1):
        curve.iteration({name: value for name, value in line.items() if value is not None})
        if found := run.evaluations.get(done):
            phases = [f"timing_s/{phase}" for phase in ("rollout", "update", "broadcast")]
            seconds = sum(line.get(phase) or 0.0 for line in lines[:done] for phase in phases)
            curve.look(done, _cost(case, lines[:done]), seconds, found.scores)
    for at, shown in ((0, case.of_base()), (run.done, case)):
        if shown.shown:
            save_pictures(picture_file(folder, shown.key), run.evaluations[at].pictures)
    with (place / "lora").reading() as path:
        adapter = describe(read_lora(str(path)), 0).checksum
    ratio = float(run.series("actor/ratio_initial_max_dev")[1].max(initial=0.0))
    evaluations, states = (sum(int(line[key]) for line in lines) for key in ("rollout/evaluations", "learner/states"))
    counts = {"evaluations": evaluations, "states": states}
    return [base.line(), curve.line(**counts, ratio_initial_max_dev=ratio, adapter=adapter)]
