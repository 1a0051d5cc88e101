"""Runners of a study's runs: worker processes, or `g2rpo_ray.run` on a Ray cluster."""

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
    """Does runs concurrently."""

    def __init__(
        self, pool: Executor, do: Callable[[Case], list[Line]],
        starting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):  # fmt: skip
        """
        Args:
            pool: executes the runs.
            do: does one run and returns its lines of the record.
            starting: a context in which the pool may start processes.
        """
        self._pool, self._do, self._starting = pool, do, starting

    def each(self, cases: Sequence[Case]) -> Iterator[tuple[Case, list[Line]]]:
        """Yields each run with its lines of the record when it is finished.

        Raises:
            RuntimeError: a run failed, or its process ended.
        """
        with self._starting():
            pending = {self._pool.submit(self._do, case): case for case in cases}
        for future in as_completed(pending):
            try:
                lines = future.result()
            except BrokenExecutor:
                failed = (case.words for future, case in pending.items() if future.exception())
                raise RuntimeError(
                    f"{next(failed)}, or a concurrent run: its process was killed, or made no progress for hung_after_s"
                ) from None
            yield pending[future], lines


@contextmanager
def ends_if_hung(limit_s: float) -> Iterator[Callable[[], None]]:
    """Ends this process if the yielded function is not called for `limit_s` seconds, even if the interpreter hangs."""

    def on_progress() -> None:
        faulthandler.dump_traceback_later(limit_s, exit=True)

    on_progress()
    try:
        yield on_progress
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def workers(on: str, jobs: int, folder: Path, address: str | None = None) -> Iterator[Workers]:
    """A runner of `jobs` concurrent runs, with configurations and images in `folder`.

    An exception in the context ends the running runs; those on Ray save a checkpoint, those in processes are lost.
    """
    with _on_ray(jobs, folder, address) if on == "ray" else _in_processes(jobs, folder) as found:
        yield found


@contextmanager
def _in_processes(jobs: int, folder: Path) -> Iterator[Workers]:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield Workers(pool, partial(_run_in_process, folder), children_ignore_interrupts)
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # it may hang
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


def _start_worker() -> None:
    """Ignores SIGINT, since the parent kills workers, and ends the worker if the parent is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # tqdm's default is a system semaphore, which a kill would leak
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_in_process(folder: Path, case: Case) -> list[Line]:
    with ends_if_hung(case.config.hung_after_s) as on_progress:
        return _lines(folder, case, on_progress)


def _lines(folder: Path, case: Case, on_progress: Callable[[], None]) -> list[Line]:
    from g2rpo_ray.local import LocalRun
    from g2rpo_ray.models import manifest_of

    run, curve = LocalRun(case.config, on_progress=on_progress), Curve(case)
    if case.kind == "base":
        evaluated = run.heldout()
        curve.look(0, 0, 0, evaluated.scores)
        save_pictures(picture_file(folder, case.key), evaluated.pictures)
        return [curve.line()]
    mismatch = 0.0
    try:
        for done, metrics, found in run.run(case.budget, case.looks):
            curve.iteration(metrics)
            mismatch = max(mismatch, metrics.get("mismatch/velocity", 0.0))
            if found:
                curve.look(done, run.cost, run.seconds, found.scores)
                evaluated = found
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        return [curve.line(failed=REFUSED)]
    if case.shown:
        save_pictures(picture_file(folder, case.key), evaluated.pictures)
    adapter = manifest_of(run.engine.lora_state(), 0).checksum
    counts = {"evaluations": run.sampler.evaluations, "states": run.states, "updates": int(run.updates)}
    return [curve.line(**counts, mismatch_velocity=mismatch, adapter=adapter)]
