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

from g2rpo_ray.checkpoint import Checkpoint, find_checkpoint, new_checkpoint, set_aside
from g2rpo_ray.config import Config, load_config
from g2rpo_ray.data import iteration_prompts
from g2rpo_ray.interrupt import Interrupt
from g2rpo_ray.journal import Journal, is_finished, summarize
from g2rpo_ray.preflight import check_files, describe_plan, prompts_of

FAILED, INVALID, INTERRUPTED = 1, 2, 130


async def train(config: Config, run: Path, checkpoint: Checkpoint | None) -> int:
    """G²RPO (algorithm 1 of the paper) from the checkpoint, or the start, to the last iteration; the exit status."""
    from actors.prometheus import prometheus_sink
    from actors.system import open_system

    train_prompts, heldout_prompts = prompts_of(config)
    done = saved = checkpoint.iteration if checkpoint else 0
    interrupt = Interrupt()
    with Journal(config, run, done, [prometheus_sink(config.name)]) as journal:
        async with open_system(config, run, checkpoint) as system:
            journal.say(f"{config.name}: encoding prompts and starting the actors")
            if not await interrupt.unless(system.start([*train_prompts, *heldout_prompts])):
                return INTERRUPTED
            journal.say(f"{config.name}: actors are ready")
            weights = await system.publish(done)

            async def evaluate() -> None:
                with journal.timed("evaluation"):
                    samples = await interrupt.unless(system.collector.samples(heldout_prompts, weights))
                if samples:
                    journal.heldout(done, samples)

            if done in (0, config.iterations):
                await evaluate()

            for iteration in range(done, config.iterations):
                prompts = iteration_prompts(train_prompts, config.data.prompts_per_iteration, config.seed, iteration)
                with journal.timed("rollout"):
                    rollout = await interrupt.unless(system.collector.rollout(iteration, prompts, weights))
                if rollout is None:
                    break
                with journal.timed("update"):
                    update = await system.learner.update(rollout.prompts)
                with journal.timed("broadcast"):
                    weights = await system.publish(iteration + 1)
                done = iteration + 1
                if _due(done, config.evaluation.every, config.iterations):
                    await evaluate()
                journal.iteration(done, rollout, update, system.counts())
                if _due(done, config.checkpoint.every, config.iterations):
                    with journal.timed("checkpoint"), new_checkpoint(run, done, config.checkpoint.keep) as folder:
                        await system.learner.save(folder)
                    saved = done
                if interrupt:
                    break

            if done > saved:
                with new_checkpoint(run, done, config.checkpoint.keep) as folder:
                    await system.learner.save(folder)
        if not is_finished(config, run, done):
            journal.say(f"stopped after iteration {done}, which is saved: the same command goes on from there")
            return INTERRUPTED
        journal.say(summarize(config, run))
    return 0


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
        run = Path(config.output).expanduser() / config.name
        checkpoint = find_checkpoint(run, options.resume)
        unchecked = check_files(config, checkpoint)
    except ValueError as error:
        return _refuse(error)
    if checkpoint and is_finished(config, run, checkpoint.iteration) and not options.check:
        print(f"{config.name} is finished; --resume never starts it again, --name gives another run\n")
        print(summarize(config, run))
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
        try:
            return asyncio.run(train(config, run, checkpoint))
        except asyncio.CancelledError:  # a second signal
            return INTERRUPTED
        except Exception as error:
            return _fail(run, error)


def _refuse(error: ValueError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return INVALID


def _fail(run: Path, error: Exception) -> int:
    """One line for the user; the traces, those of actors included, go to a file of the run."""
    log = run / "error.log"
    log.write_text("".join(traceback.format_exception(error)))
    reason = textwrap.shorten(str(getattr(error, "cause", None) or error), 500)
    print(f"error: {type(error).__name__}: {reason} (the whole trace is in {log})", file=sys.stderr)
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
