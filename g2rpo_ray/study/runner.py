"""How a run of a study is done: in a process that does others after it, or by `g2rpo_ray.run` on a Ray cluster."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from g2rpo_ray.study.on_ray import Commands, run_on_ray
from g2rpo_ray.study.plan import Case
from g2rpo_ray.study.record import REFUSED, Curve, Line, picture_file, save_pictures

FIRST_S = 6 * 3600.0  # until the first run of a study has ended here, before one is taken for hung
SHORTEST_S = 600.0
TIMES = 10.0  # as long as nothing ended before


class Workers:
    """Those who do the runs, some at a time."""

    def __init__(self, pool: Executor, do: Callable[[Case], list[Line]], bounded: bool):
        """`bounded`: whether their time is bounded here; a run on Ray has limits of its own."""
        self._pool, self._do, self._bounded = pool, do, bounded
        self._longest: float | None = None  # seconds from one end to the next

    def each(self, cases: Sequence[Case]) -> Iterator[tuple[Case, list[Line]]]:
        """A run and the lines of the record that it gives, as it is done.

        Raises:
            RuntimeError: a run failed, or none ended for so long that what is going on is taken for hung.
        """
        going, began = {self._pool.submit(self._do, case): case for case in cases}, time.monotonic()
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
def workers(on: str, jobs: int, folder: Path, address: str | None = None) -> Iterator[Workers]:
    """Who does the runs, `jobs` at a time, with their configurations and pictures in `folder`.

    Left by an exception, what is going on ends: a process has nothing to save, a run on Ray saves its checkpoint.
    """
    with _on_ray(jobs, folder, address) if on == "ray" else _here(jobs, folder) as there:
        yield there


@contextmanager
def _here(jobs: int, folder: Path) -> Iterator[Workers]:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield Workers(pool, partial(_run_here, folder), bounded=True)
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # it may stand still
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def _on_ray(jobs: int, folder: Path, address: str | None) -> Iterator[Workers]:
    pool, commands = ThreadPoolExecutor(jobs), Commands()
    try:
        yield Workers(pool, partial(run_on_ray, folder, address, commands), bounded=False)
    except BaseException:
        commands.end()
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            commands.end()
        raise
    pool.shutdown()


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


def _run_here(folder: Path, case: Case) -> list[Line]:
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
