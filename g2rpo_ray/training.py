"""`train`: everything around the training loop: checks, run directory, cluster, results."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # slow imports happen when a run starts
    from g2rpo_ray.config import Config
    from g2rpo_ray.data import Prompts
    from g2rpo_ray.runs.checkpoint import Checkpoint
    from g2rpo_ray.runs.lease import Lease
    from g2rpo_ray.runs.reader import Run
    from g2rpo_ray.runs.storage import Folder
    from g2rpo_ray.runs.tracking import Sink

# files of a run directory that actors read themselves, and the driver's copy omits
NOT_COPIED = ("checkpoints", "embeddings", "lora", "lora_ema", "lease.json")


def train(
    config: "Config",
    *,
    rewards: Mapping[str, Any] | None = None,
    prompts: Any = None,
    heldout: Any = None,
    callbacks: "Sequence[Sink]" = (),
    resume: str = "auto",
    address: str | None = None,
) -> "Run":
    """Trains on Ray and returns the run, written below `config.output`. An interrupted run can be resumed.

    Works in a script, a thread and a notebook, any number of times in one process.

    Args:
        config: see `load_config`.
        rewards: by name, instead of `config.rewards`. A function of images (uint8 [N, H, W, 3]) and prompts (N texts)
            that returns N numbers, higher is better, None or NaN for a missing one; an object with such a method
            `score`; or settings as a mapping, whose `kind` may be such a function. Functions are sent by cloudpickle.
        prompts: instead of `data.train_prompts`: a file, a list of texts or of objects with `prompt` and `metadata`,
            or a `datasets.Dataset` with such columns. With `model.sources` they may have images, such as `source`: a
            path, bytes, a PIL image or an array uint8 [H, W, 3], of 16 MiB in all.
        heldout: instead of `data.heldout_prompts`, in the same forms.
        callbacks: each is called with the iteration, counted from 1 (0: before the first), and its metrics. An
            exception in one ends the run.
        resume: "auto": from the run's latest checkpoint, if any; "never": from the beginning; or the path of
            another run's checkpoint.
        address: of a Ray cluster. Default: the cluster that Ray is connected to, RAY_ADDRESS, or a private one.

    Raises:
        ValueError: one line; a setting, file, reward or cluster cannot be used. Nothing was started.
        RunFailed: one line; the run ended early, and error.log in its folder has the trace.
        RunInterrupted: a signal ended it; finished work is saved.
    """
    from g2rpo_ray.config import with_settings
    from g2rpo_ray.runs.reader import read_run

    given = {"rewards": rewards, "data.train_prompts": prompts, "data.heldout_prompts": heldout}
    folder, _ = run_to_end(with_settings(config, given), callbacks, resume, address)
    return read_run(str(folder))


def run_to_end(
    config: "Config",
    callbacks: "Sequence[Sink]" = (),
    resume: str = "auto",
    address: str | None = None,
    wait_s: float = 0.0,
) -> "tuple[Folder, int]":
    """Like `train`, but returns the run directory and the number of finished iterations.

    Waits up to `wait_s` seconds for another process that writes the run.
    """
    with prepared(config, resume, wait_s=wait_s) as start, ExitStack() as stack:
        if _is_finished(start):
            return start.run, start.done
        from g2rpo_ray.actors.access import reachable
        from g2rpo_ray.actors.cluster import check_resources, cluster
        from g2rpo_ray.rollout.cost import object_store_bytes

        private = stack.enter_context(cluster(address, object_store_bytes(start.config)))
        check_resources(start.config)
        return start.run, _train(start, reachable(start.run.path, private), callbacks)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked run that can start."""

    config: "Config"
    run: "Folder"
    prompts: "Prompts"
    lease: "Lease"
    checkpoint: "Checkpoint | None"
    """Checkpoint to start from, of this run or another."""
    made_with: Mapping[str, Any]
    """The settings in the form that checkpoints record."""
    unchecked: list[str]
    """A line for each file that could not be checked on this machine."""

    @property
    def done(self) -> int:
        """Number of finished iterations."""
        return self.checkpoint.iteration if self.checkpoint else 0


@contextmanager
def prepared(config: "Config", resume: str, read_only: bool = False, wait_s: float = 0.0) -> Iterator[Prepared]:
    """Checks a configuration and its run directory; holds the directory's lease inside unless `read_only`.

    Raises:
        ValueError: one line with the key or file, the given value and the allowed ones.
    """
    from g2rpo_ray.config.resume import settings
    from g2rpo_ray.preflight import check_files, check_lasting, fit_batches, open_run, read_run_prompts
    from g2rpo_ray.runs.lease import Lease
    from g2rpo_ray.runs.start import find_start

    check_lasting(config)
    run = open_run(config)
    prompts = read_run_prompts(config)
    config = fit_batches(config)
    lease = Lease(run, wait_s)
    with ExitStack() as stack:
        if not read_only:
            stack.enter_context(lease)
        made_with = settings(config, prompts.train, prompts.heldout, prompts.metadata)
        checkpoint = find_start(run, resume, made_with)
        yield Prepared(config, run, prompts, lease, checkpoint, made_with, check_files(config, checkpoint))


def _is_finished(start: Prepared) -> bool:
    """Repairs the run after a killed process. If the run is finished, prints its summary and returns True."""
    from g2rpo_ray.report.page import write_report
    from g2rpo_ray.runs.checkpoint import settle_checkpoints
    from g2rpo_ray.runs.journal import is_finished, is_stopped, summarize
    from g2rpo_ray.runs.start import is_own
    from g2rpo_ray.runs.trace import traced

    config, run, done = start.config, start.run, start.done
    if not is_own(run, start.checkpoint):
        return False
    with traced(run, OSError):
        settle_checkpoints(run, done, config.checkpoint.keep, is_stopped(config, run, done))
        if not is_finished(config, run, done):
            return False
        print(f"{config.name} is finished; another --name gives another run\n")
        with run.workspace(NOT_COPIED) as here:
            began = time.time()
            print(summarize(config, here, done))
            write_report(here, run)
            if run.path is None:
                run.take(here, newer_than=began)
    return True


def _train(start: Prepared, reachable: AbstractContextManager[None], callbacks: "Sequence[Sink]") -> int:
    """Runs the loop on the cluster that Ray is connected to; returns the number of finished iterations."""
    from g2rpo_ray.actors.interrupt import run_interruptible
    from g2rpo_ray.actors.session import run_session  # imports Ray, which must not happen before a cluster exists
    from g2rpo_ray.exits import RunInterrupted
    from g2rpo_ray.run import training_loop
    from g2rpo_ray.runs.start import begin
    from g2rpo_ray.runs.trace import FILE, traced
    from g2rpo_ray.runs.watchdog import watchdog

    config, run = start.config, start.run
    with ExitStack() as stack:
        stack.enter_context(traced(run))
        checkpoint = begin(run, start.checkpoint, start.made_with)
        stack.enter_context(reachable)
        here = stack.enter_context(run.workspace(NOT_COPIED))
        stack.enter_context(watchdog(run.path and run.path / FILE))
        given = (config, start.prompts, run, here, checkpoint, start.lease)
        done = run_interruptible(lambda interrupt: run_session(training_loop, *given, interrupt, callbacks))
    if done is None:
        raise RunInterrupted
    return done
