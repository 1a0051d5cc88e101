"""Runners of a study's runs: processes that do one run after another, or `g2rpo_ray.run` on a Ray cluster."""

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from tqdm import tqdm

from g2rpo_ray.exits import children_ignore_interrupts
from g2rpo_ray.study.on_ray import Commands, run_on_ray
from g2rpo_ray.study.plan import Case
from g2rpo_ray.study.record import REFUSED, Curve, Line, picture_file, save_pictures


class Workers:
    """Does the runs, several at a time."""

    def __init__(
        self, pool: Executor, do: Callable[[Case], list[Line]],
        starting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):  # fmt: skip
        """`starting`: entered while the pool may start processes."""
        self._pool, self._do, self._starting = pool, do, starting

    def each(self, cases: Sequence[Case]) -> Iterator[tuple[Case, list[Line]]]:
        """A run and the lines of the record that it gives, as it is done.

        Raises:
            RuntimeError: a run failed, or its process ended.
        """
        with self._starting():
            going = {self._pool.submit(self._do, case): case for case in cases}
        for future in as_completed(going):
            try:
                lines = future.result()
            except BrokenExecutor:
                left = (case.words for future, case in going.items() if future.exception())
                raise RuntimeError(
                    f"{next(left)}, or a run beside it: its process was killed, or made no progress for hung_after_s"
                ) from None
            yield going[future], lines


@contextmanager
def ends_if_hung(limit_s: float) -> Iterator[Callable[[], None]]:
    """End this process if what it yields is not called for `limit_s` seconds, whatever holds the interpreter."""

    def moved() -> None:
        faulthandler.dump_traceback_later(limit_s, exit=True)

    moved()
    try:
        yield moved
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def workers(on: str, jobs: int, folder: Path, address: str | None = None) -> Iterator[Workers]:
    """A runner of `jobs` runs at a time, with configurations and pictures in `folder`.

    Left by an exception, what is going on ends: a process has nothing to save, a run on Ray saves its checkpoint.
    """
    with _on_ray(jobs, folder, address) if on == "ray" else _here(jobs, folder) as there:
        yield there


@contextmanager
def _here(jobs: int, folder: Path) -> Iterator[Workers]:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield Workers(pool, partial(_run_here, folder), children_ignore_interrupts)
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
        yield Workers(pool, partial(run_on_ray, folder, address, commands))
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
    with ends_if_hung(case.config.hung_after_s) as moved:
        return _lines(folder, case, moved)


def _lines(folder: Path, case: Case, moved: Callable[[], None]) -> list[Line]:
    from g2rpo_ray.local import LocalRun
    from g2rpo_ray.models import manifest_of

    run, curve = LocalRun(case.config, moved=moved), Curve(case)
    if case.kind == "base":
        judged = run.heldout()
        curve.look(0, 0, 0, judged.scores)
        save_pictures(picture_file(folder, case.key), judged.pictures)
        return [curve.line()]
    mismatch = 0.0
    try:
        for done, metrics, found in run.run(case.budget, case.looks):
            curve.iteration(metrics)
            mismatch = max(mismatch, metrics.get("mismatch/velocity", 0.0))
            if found:
                curve.look(done, run.cost, run.seconds, found.scores)
                judged = found
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        return [curve.line(failed=REFUSED)]
    if case.shown:
        save_pictures(picture_file(folder, case.key), judged.pictures)
    adapter = manifest_of(run.engine.lora_state(), 0).checksum
    counts = {"evaluations": run.sampler.evaluations, "states": run.states, "updates": int(run.updates)}
    return [curve.line(**counts, mismatch_velocity=mismatch, adapter=adapter)]
