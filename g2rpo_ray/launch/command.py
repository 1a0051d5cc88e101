"""The command line of a run: what is checked before anything starts, and what a user is told at the end."""

import argparse
import asyncio
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from g2rpo_ray.config import dump_config, load_config
from g2rpo_ray.launch.check import check
from g2rpo_ray.launch.next_steps import next_steps
from g2rpo_ray.launch.preflight import (
    check_files,
    check_writable,
    find_start,
    fit_batches,
    open_run,
    read_run_prompts,
)
from g2rpo_ray.launch.witness import witness
from g2rpo_ray.record.journal import is_finished, summarize
from g2rpo_ray.record.lease import LEASE, Lease, LeaseLost
from g2rpo_ray.record.lineage import ASIDE, begin_lineage, finish_beginning
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.words import one_line

if TYPE_CHECKING:  # Ray is loaded when there is something to run
    from actors.session import Loop

FAILED, INVALID, INTERRUPTED = 1, 2, 130
# of a run directory: the actors read them where they are
NOT_NEEDED_HERE = ("checkpoints", "embeddings", "lora", "lora_ema", ASIDE, LEASE)


def launch(loop: "Loop", arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    from actors.cluster import leave

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return leave(_launch(loop, make_parser().parse_args(arguments)))
    except KeyboardInterrupt:  # before there was anything to save
        return INTERRUPTED


def _launch(loop: "Loop", options: argparse.Namespace) -> int:
    name = [f"name={options.name}"] if options.name else []
    with ExitStack() as stack:
        try:
            config = load_config(options.config, [*options.set, *name])
            run = open_run(config)
            prompts = read_run_prompts(config)
            config = fit_batches(config)
            lease = Lease(run)
            if not options.check:
                stack.enter_context(lease)
                finish_beginning(run)
            start = find_start(run, options.resume, config, prompts)
            unchecked = check_files(config, start.checkpoint)
        except ValueError as error:
            return _refuse(error)
        if not options.check and start.is_in(run) and is_finished(config, run, start.iteration):
            print(f"{config.name} is finished; --resume never starts it again, --name gives another run\n")
            with run.workspace(NOT_NEEDED_HERE) as here:
                print(summarize(config, here))
            print(next_steps(config, run, start.iteration))
            return 0
        from actors.access import reachable
        from actors.cluster import check_resources, cluster

        try:
            if options.check:
                check_writable(config, run)
                check(config, prompts, unchecked, options.address)
                return 0
            private = not (options.address or os.environ.get("RAY_ADDRESS"))
            stack.enter_context(cluster(options.address))
            check_resources(config)
        except ValueError as error:
            return _refuse(error)
        from actors.session import run_session  # imports Ray, which may not be before there is a cluster

        try:
            checkpoint = begin_lineage(run, start, dump_config(config)) if start.anew else start.checkpoint
            stack.enter_context(reachable(run.path, private))
            here = stack.enter_context(run.workspace(NOT_NEEDED_HERE))
            stack.enter_context(witness(run.path and run.path / "error.log"))
            done = asyncio.run(run_session(loop, config, prompts, run, here, checkpoint, lease))
        except asyncio.CancelledError:  # a second signal
            return INTERRUPTED
        except LeaseLost as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        except Exception as error:
            return fail(run, error)
    return 0 if done else INTERRUPTED


def _refuse(error: ValueError) -> int:
    print(f"error: {one_line(error, 1000)}", file=sys.stderr)
    return INVALID


def fail(run: Folder, error: Exception) -> int:
    """One line for the user; the traces, those of actors included, go to a file of the run."""
    trace = f"the whole trace is in {run / 'error.log'}"
    try:
        run.write("error.log", "".join(traceback.format_exception(error)).encode())
    except OSError as unwritten:
        trace = f"no trace could be written: {unwritten}"
    cause = getattr(error, "cause", None) or error
    print(f"error: {type(cause).__name__}: {one_line(cause, 500)} ({trace})", file=sys.stderr)
    return FAILED


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m g2rpo_ray.run",
        description="Align a text-to-image flow model by reinforcement learning on sampling trees, on Ray.",
        epilog="examples:\n"
        "  python -m g2rpo_ray.run                                       the quickstart, under 3 minutes on two cores\n"
        "  python -m g2rpo_ray.run --set method=mix_grpo --name mix      by another method\n"
        "  python -m g2rpo_ray.run --config flux_hps --check             a packaged configuration: what it needs\n"
        "  python -m g2rpo_ray.run --config my.yaml --set output=s3://bucket/runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, or the name of a packaged file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument("--name", help="name of the run, its folder below `output`")
    parser.add_argument(
        "--resume", nargs="+", metavar="auto|never|PATH [changed]", default=["auto"],
        help="go on from the latest checkpoint (default), start anew, or go back; `changed`: with other settings",
    )  # fmt: skip
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else one on this machine")
    parser.add_argument(
        "--check", action="store_true", help="check settings, files, rewards, resources; print the plan, end"
    )
    return parser
