"""`python -m g2rpo_ray.scale`: changes the number of rollout actors or reward servers of a running run."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from g2rpo_ray.config import load_config
from g2rpo_ray.config.resources import MAX_ACTORS
from g2rpo_ray.exits import INVALID, Parser, command
from g2rpo_ray.messages import one_line
from g2rpo_ray.runs.storage import Folder

POOLS = {"rollout": "rollout.max_actors", "completions": "rollout.completions.max_actors"}
"""Settings of the sizes of pools with an option of their own."""
ANSWER_TIMEOUT_S = 30.0  # of the run's control actor, which is otherwise idle


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo scale`."""
    parser = Parser(
        prog="python -m g2rpo_ray.scale",
        description="Change the number of actors of a running run.",
        epilog="example: python -m g2rpo_ray.scale --name flux_hps --rollout 12 --reward hpsv2=2",
    )
    parser.add_argument("--name", default=load_config().name, help="name of the run (default: the quickstart's)")
    parser.add_argument("--output", default=load_config().output, help="parent of its folder (default: %(default)s)")
    parser.add_argument("--rollout", metavar="N", type=int, help="rollout actors")
    parser.add_argument("--completions", metavar="N", type=int, help="actors of rollout.completions")
    parser.add_argument("--reward", metavar="NAME=N", action="append", default=[], help="servers of a reward")
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else the one started here")
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Requests the sizes; returns the exit status: 0 done, 2 invalid input."""
    from g2rpo_ray.actors.cluster import leave

    return leave(_main(options))


def _main(options: argparse.Namespace) -> int:
    try:
        given = {pool: getattr(options, pool) for pool in POOLS}
        sizes = {pool: size for pool, size in given.items() if size is not None}
        sizes.update(_reward_size(text) for text in options.reward)
        if not sizes:
            raise ValueError("--rollout N, --completions N or --reward NAME=N: give at least one")
        for pool, size in sizes.items():
            if not 1 <= size <= MAX_ACTORS:
                option = f"--{pool}" if pool in POOLS else f"--reward {pool}"
                raise ValueError(f"{option}: {size} given; must be from 1 to {MAX_ACTORS}")
        return _ask(options.name, options.output, options.address, sizes)
    except ValueError as error:
        print(f"error: {one_line(error, 1000)}", file=sys.stderr)
        return INVALID


@contextmanager
def _cluster_of(run: str, output: str, address: str | None) -> Iterator[None]:
    """Connects to the cluster at the address, else to the run's private one, else to one started on this machine."""
    from g2rpo_ray.actors.access import FILE, address_of
    from g2rpo_ray.actors.cluster import cluster

    folder = (Folder(output) / run).path
    private = address_of(folder) if folder and not address else None
    with ExitStack() as stack:
        try:
            named = address or private or (None if os.environ.get("RAY_ADDRESS") else "auto")
            stack.enter_context(cluster(named))
        except ValueError as error:
            if private is None:
                raise
            raise ValueError(
                f"--name: no run {run!r} is running; {folder}/{FILE} is left from a killed one ({error})"
            ) from None
        yield


def _ask(run: str, output: str, address: str | None, sizes: dict[str, int]) -> int:
    with _cluster_of(run, output, address):
        import ray

        from g2rpo_ray.actors.control import NAMESPACE, control_name

        try:
            control = ray.get_actor(control_name(run), namespace=NAMESPACE)
        except ValueError:
            raise ValueError(
                f"--name: no run {run!r} is running on this cluster; give the --output of a run on a private cluster, "
                "or the --address of another cluster"
            ) from None
        for pool, size in sizes.items():
            asked: Any = control.ask.remote(pool, size)  # a named actor has no type
            try:
                now = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):  # which may come first
                setting = f"{POOLS[pool]}={size}" if pool in POOLS else f"replicas={size} for {pool}"
                raise ValueError(
                    f"--name: run {run!r} did not answer within {ANSWER_TIMEOUT_S:.0f} s, because its control actor "
                    f"hangs or its node is down; stop the run and start it with {setting}, it resumes"
                ) from None
            except ray.exceptions.RayActorError:
                raise ValueError(f"--name: run {run!r} is ending; start it again with this number") from None
            if pool not in now and pool in POOLS:
                raise ValueError(f"--{pool}: {size} given, but in this run rollout actors compute completions")
            if pool not in now:
                raise ValueError(f"--reward: {pool!r} given; this run has {', '.join(sorted(set(now) - set(POOLS)))}")
            print(f"{pool}: {size} actors requested")
    return 0


def _reward_size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not re.fullmatch("[0-9]{1,18}", number):
        raise ValueError(f"--reward: {text!r} given; expected NAME=N")
    return name, int(number)
