"""The command line and the training loop.

prompts ─► anchors ─► branches at every granularity ─► images ─► scores ─► advantages ─► LoRA ─► next iteration
           └──────── rollout actors ─────────┘         └ reward servers ┘  └───── learner ────┘
"""

import argparse
import asyncio
import logging
import sys
import textwrap
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from g2rpo_ray.config import Config, load_config
from g2rpo_ray.data import drawn_prompts, iteration_prompts
from g2rpo_ray.launch.interrupt import Interrupt
from g2rpo_ray.launch.preflight import Prompts, check_files, describe_plan, fit_batches, open_run, read_run_prompts
from g2rpo_ray.record.checkpoint import Checkpoint, find_checkpoint, finish_checkpoint, new_checkpoint, set_aside
from g2rpo_ray.record.journal import Journal, is_finished, summarize
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import Rollout

if TYPE_CHECKING:  # Ray is loaded when there is something to run
    from actors.system import System
    from actors.weights import PublishedWeights

FAILED, INVALID, INTERRUPTED = 1, 2, 130
NOT_NEEDED_HERE = ("checkpoints", "embeddings", "lora")  # of a run directory: the actors read them where they are


async def train(config: Config, prompts: Prompts, run: Folder, here: Path, checkpoint: Checkpoint | None) -> int:
    """Train from the checkpoint, or the start, to the last iteration; the exit status.

    A learner that is lost is started again from the latest checkpoint, and the iterations since are done again.
    `here` is the run directory, or a copy of it on this machine.
    """
    from actors.pool import is_lost_object
    from actors.prometheus import prometheus_sink
    from actors.system import System, open_system
    from learner.group import LearnerLost

    used = drawn_prompts(prompts.train, config.data.prompts_per_iteration, config.seed, config.iterations)
    done = checkpoint.iteration if checkpoint else 0
    interrupt = Interrupt()
    with Journal(config, here, done, [prometheus_sink(config.name)], kept=run) as journal:
        async with open_system(System, config, run) as system:
            journal.say(f"{config.name}: starting the actors")
            if prompts.dropped:
                journal.say(f"{prompts.dropped} training prompts are held out too and are not trained on")
            if not await interrupt.unless(system.start([*used, *prompts.heldout], checkpoint, journal.say)):
                journal.say(f"stopped before anything was computed; {done} iterations are saved")
                return INTERRUPTED
            journal.say(f"{config.name}: actors are ready")
            restarts = 0
            while True:
                try:
                    if restarts:
                        await system.start_learner(checkpoint)
                        journal.say("the learner is ready again")
                    done = await iterate(config, prompts, run, system, journal, interrupt, done)
                    break
                except Exception as error:
                    restarts += 1
                    lost = isinstance(error, LearnerLost) or is_lost_object(error)
                    if not lost or restarts > config.learner.max_restarts:
                        raise
                    checkpoint = find_checkpoint(run, "auto")
                    done = checkpoint.iteration if checkpoint else 0
                    journal.say(f"learner lost ({str(error).splitlines()[0]}); going on from iteration {done}")
                    journal.rewind(done)
        if not is_finished(config, Folder(here), done):
            journal.say(f"stopped after iteration {done}, which is saved: the same command goes on from there")
            return INTERRUPTED
        journal.say(summarize(config, here))
    return 0


async def iterate(
    config: Config, prompts: Prompts, run: Folder, system: "System", journal: Journal, interrupt: Interrupt, done: int
) -> int:
    """G²RPO (algorithm 1 of the paper): iterations from number `done` on; how many are done and saved at the end."""
    from learner.group import LearnerLost

    rollouts: dict[int, asyncio.Task[Rollout]] = {}
    saved = done

    def sample(iteration: int, weights: "PublishedWeights") -> None:
        if iteration not in rollouts and iteration < config.iterations:
            drawn = iteration_prompts(prompts.train, config.data.prompts_per_iteration, config.seed, iteration)
            rollouts[iteration] = asyncio.create_task(system.collector.rollout(iteration, drawn, weights))

    async def evaluate(weights: "PublishedWeights") -> float | None:
        with journal.timed("evaluation"):
            samples = await interrupt.unless(system.collector.samples(done, prompts.heldout, weights))
        return journal.heldout(done, samples) if samples else None

    async def save(score: float | None = None) -> None:
        with journal.timed("checkpoint"):
            files = await system.learner.save(new_checkpoint(run, done))
            await asyncio.to_thread(journal.keep)  # before there is a checkpoint to go on from
            await asyncio.to_thread(finish_checkpoint, run, done, files, config.checkpoint.keep, score)

    try:
        if config.rollout.max_staleness and 0 < done < config.iterations:
            sample(done, await system.publish_again(done - 1))  # as when the run was not interrupted
        weights = await system.publish(done)
        if done in (0, config.iterations):
            await evaluate(weights)
        while done < config.iterations and not interrupt:
            for ahead in range(config.rollout.max_staleness + 1):
                sample(done + ahead, weights)
            with journal.timed("rollout"):
                rollout = await interrupt.unless(rollouts.pop(done))
            if rollout is None:
                break
            with journal.timed("update"):
                on_policy = rollout.weights_version == done
                update = await system.learner.update(rollout.prompts, on_policy)
            with journal.timed("broadcast"):
                weights = await system.publish(done + 1)
            done += 1
            judged = _due(done, config.evaluation.every, config.iterations)
            score = await evaluate(weights) if judged else None
            journal.iteration(done, rollout, update, system.counts(), system.take_spans())
            if judged or _due(done, config.checkpoint.every, config.iterations) or system.learner_leaves:
                await save(score)
                saved = done
            if system.learner_leaves and done < config.iterations:
                raise LearnerLost("its node is about to go")
        if done > saved:
            await save()
        return done
    finally:
        for task in rollouts.values():
            task.cancel()


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return _main(_parser().parse_args(arguments))
    except KeyboardInterrupt:  # before there was anything to save
        return INTERRUPTED


def _main(options: argparse.Namespace) -> int:
    name = [f"name={options.name}"] if options.name else []
    try:
        config = load_config(options.config, [*options.set, *name])
        run = open_run(config)
        checkpoint = find_checkpoint(run, options.resume)
        prompts = read_run_prompts(config)
        unchecked = check_files(config, checkpoint)
        config = fit_batches(config)
    except ValueError as error:
        return _refuse(error)
    if checkpoint and is_finished(config, run, checkpoint.iteration) and not options.check:
        print(f"{config.name} is finished; --resume never starts it again, --name gives another run\n")
        with run.workspace(NOT_NEEDED_HERE) as here:
            print(summarize(config, here))
        return 0
    from actors.cluster import check_resources, cluster

    with ExitStack() as stack:
        try:
            stack.enter_context(cluster(options.address))
            check_resources(config)
        except ValueError as error:
            return _refuse(error)
        if options.check:
            print("\n".join([describe_plan(config), *(f"not checked:   {line}" for line in unchecked)]))
            return 0
        if checkpoint is None:
            set_aside(run)
        here = stack.enter_context(run.workspace(NOT_NEEDED_HERE))
        try:
            return asyncio.run(train(config, prompts, run, here, checkpoint))
        except asyncio.CancelledError:  # a second signal
            return INTERRUPTED
        except Exception as error:
            return fail(run, error)


def _refuse(error: ValueError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return INVALID


def fail(run: Folder, error: Exception) -> int:
    """One line for the user; the traces, those of actors included, go to a file of the run."""
    trace = f"the whole trace is in {run / 'error.log'}"
    try:
        run.write("error.log", "".join(traceback.format_exception(error)).encode())
    except OSError as unwritten:
        trace = f"no trace could be written: {unwritten}"
    cause = getattr(error, "cause", None) or error
    print(f"error: {type(cause).__name__}: {textwrap.shorten(str(cause), 500)} ({trace})", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m g2rpo_ray.run", description="Fine-tune a text-to-image flow model with G²RPO on Ray."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings; default: the quickstart that ships with it")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument("--name", help="name of the run, its folder below `output`")
    parser.add_argument(
        "--resume", metavar="auto|never|PATH", default="auto", help="go on from the latest checkpoint (default), or not"
    )
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else one on this machine")
    parser.add_argument("--check", action="store_true", help="check settings, files and resources, print the plan, end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
