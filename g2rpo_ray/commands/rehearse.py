"""Rehearses a configuration on this machine: checks all of it, then runs it with a twin of its model."""

import argparse
import logging
import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from g2rpo_ray.config import Config, load_config
from g2rpo_ray.exits import Parser, RunInterrupted, command, path_option
from g2rpo_ray.rehearsal.devices import Fleet, fleet

ACTOR = "ray::RolloutActor"  # the title of its process


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo rehearse`."""
    parser = Parser(
        prog="python -m g2rpo_ray.rehearse",
        description="Check all of a configuration, then run two iterations with a tiny twin of its model, on this "
        "machine.",
        epilog="examples:\n"
        "  python -m g2rpo_ray.rehearse --config flux_hps\n"
        "  python -m g2rpo_ray.rehearse --config my.yaml --local     in this process, without Ray",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, or the name of a packaged file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument(
        "--local", action="store_true", help="in this process, without Ray: no actors, checkpoint, resume or report"
    )
    parser.add_argument(
        "--devices", metavar="KIND:NUMBER", type=fleet,
        help="also compare the actors' memory at full size with that of a device, such as h100:8",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=path_option,
        help="a new folder; default: a temporary folder",
    )
    return parser


def rehearse(config: Config, folder: Path, local: bool, devices: Fleet | None = None) -> bool:
    """Prints the findings; returns True if there is no problem.

    Args:
        folder: for the twin and its run.
        local: rehearse in this process, without Ray.
        devices: compare the actors' memory at full size with these.

    Raises:
        ValueError: one line; no twin can be made of such a model.
        RunFailed: one line; the rehearsal ended early.
    """
    from g2rpo_ray.rehearsal.findings import look, look_at_memory
    from g2rpo_ray.rehearsal.small import differences, small
    from g2rpo_ray.rehearsal.twin import write_twin

    found = look(config)
    sizes = look_at_memory(config, found, devices) if devices else []
    for kind, lines in (("full size", sizes), ("problem", found.problems), ("not checked", found.unchecked)):
        for line in lines:
            print(f"{kind + ':':<15}{line}")
    if found.prompts is None or found.shaped is None:
        print("rehearsed:     no; a twin needs prompts and the configuration files of the model")
        return False
    parameters = write_twin(found.shaped.model, folder / "twin")
    print(f"twin:          of {config.model.path}, {parameters:,} random parameters: {folder / 'twin'}")
    rehearsed = small(config, found.untried, found.prompts, folder, local)
    print(f"smaller:       {', '.join(differences(config, rehearsed))}")
    for key, reason in found.untried.items():
        print(f"stand-in:      {key}: {rehearsed.rewards_by_key[key].kind} scores instead: {reason}", flush=True)
    began = time.monotonic()
    try:
        done = _in_this_process(rehearsed) if local else _on_ray(rehearsed)
    except ValueError as error:
        print(f"rehearsed:     failed: {error}")
        return False
    print(f"rehearsed:     {done}, in {time.monotonic() - began:.0f} s")
    return not found.problems


def _in_this_process(config: Config) -> str:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from g2rpo_ray.local import LocalRun

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()  # else they warn of each truncated prompt
    run = LocalRun(config)
    run.heldout()
    for iteration in range(config.iterations):
        run.step(iteration)
    run.heldout()
    run.save(Path(config.output) / config.name / "lora")
    return (
        f"{config.iterations} iterations of {run.cost:g} evaluations in one process, held-out samples before and after"
    )


def _on_ray(config: Config) -> str:
    from g2rpo_ray.actors.cluster import cluster
    from g2rpo_ray.rollout.cost import object_store_bytes
    from g2rpo_ray.training import run_to_end

    os.environ.pop("RAY_ADDRESS", None)  # the twin is on this machine only
    with cluster(None, object_store_bytes(config)):
        with suppress(RunInterrupted):
            run_to_end(config, [_inject_faults])
        run, done = run_to_end(config)
    return (
        f"{done} iterations through Ray by {config.rollout.max_actors} rollout actors, one of them killed, and "
        f"{config.learner.ranks} learner ranks; stopped after the first, resumed from its checkpoint, evaluated; "
        f"report: {run / 'report.html'}"
    )


def _inject_faults(iteration: int, metrics: Mapping[str, float]) -> None:
    """Kills a rollout actor before the first iteration, and interrupts the run after it."""
    import psutil

    if iteration == 0:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # a process may end meanwhile
                if "".join(child.cmdline()).startswith(ACTOR):
                    child.kill()
                    return
        raise RuntimeError(f"no process of this command is called {ACTOR}")
    if iteration == 1:
        os.kill(os.getpid(), signal.SIGINT)


@command(make_parser)
def _main(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.set)
    folder = options.output or Path(tempfile.mkdtemp(prefix="g2rpo-rehearsal-"))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output: {folder} given, which is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return 0 if rehearse(config, folder, options.local, options.devices) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearses; returns the exit status: 0 no problem, 1 a problem, 2 invalid input, 130 interrupted."""
    from g2rpo_ray.actors.cluster import leave

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return leave(_main(arguments))
