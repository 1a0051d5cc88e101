"""`python -m g2rpo_ray.scale`: change the number of rollout actors or reward servers of a run that is going on."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from g2rpo_ray.config import load_config
from g2rpo_ray.config.schema import MOST_ACTORS
from g2rpo_ray.exits import INVALID, Parser, command
from g2rpo_ray.messages import one_line
from g2rpo_ray.runs.storage import Folder

ANSWER_S = 30.0  # for the run's control actor, which has nothing else to do


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(
        prog="python -m g2rpo_ray.scale",
        description="Change the size of a running job.",
        epilog="example: python -m g2rpo_ray.scale --name flux_hps --rollout 12 --reward hpsv2=2",
    )
    parser.add_argument("--name", default=load_config().name, help="name of the run (default: the quickstart's)")
    parser.add_argument("--output", default=load_config().output, help="where its folder is (default: %(default)s)")
    parser.add_argument("--rollout", metavar="N", type=int, help="rollout actors")
    parser.add_argument("--reward", metavar="NAME=N", action="append", default=[], help="servers of a reward")
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else the one started here")
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Ask for the sizes; returns the exit status: 0 done, 2 invalid input."""
    from g2rpo_ray.actors.cluster import leave

    return leave(_main(options))


def _main(options: argparse.Namespace) -> int:
    try:
        sizes = {"rollout": options.rollout} if options.rollout is not None else {}
        sizes.update(_reward_size(text) for text in options.reward)
        if not sizes:
            raise ValueError("--rollout N or --reward NAME=N: give at least one")
        for pool, size in sizes.items():
            if not 1 <= size <= MOST_ACTORS:
                option = "--rollout" if pool == "rollout" else f"--reward {pool}"
                raise ValueError(f"{option}: {size} given; must be from 1 to {MOST_ACTORS}")
        return _ask(options.name, options.output, options.address, sizes)
    except ValueError as error:
        print(f"error: {one_line(error, 1000)}", file=sys.stderr)
        return INVALID


@contextmanager
def _cluster_of(run: str, output: str, address: str | None) -> Iterator[None]:
    """The cluster at the address, or the private one that the run left word of, or the one that was started here."""
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
            left = f"{folder}/{FILE} was left by one that was killed"
            raise ValueError(f"--name: no run {run!r} is going on, {left} ({error})") from None
        yield


def _ask(run: str, output: str, address: str | None, sizes: dict[str, int]) -> int:
    with _cluster_of(run, output, address):
        import ray

        from g2rpo_ray.actors.control import NAMESPACE, control_name

        try:
            control = ray.get_actor(control_name(run), namespace=NAMESPACE)
        except ValueError:
            raise ValueError(
                f"--name: no run {run!r} is going on on this cluster; give the --output of a run on a private cluster, "
                "or the --address of another cluster"
            ) from None
        for pool, size in sizes.items():
            asked: Any = control.ask.remote(pool, size)  # a named actor has no type
            try:
                now = ray.get(asked, timeout=ANSWER_S)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):  # which may come first
                raise ValueError(
                    f"--name: run {run!r} does not answer for up to {ANSWER_S:.0f} s: its control actor stands still, "
                    "or its node is gone; end the run and start it again, with this number: it goes on"
                ) from None
            except ray.exceptions.RayActorError:
                raise ValueError(f"--name: run {run!r} ends just now; start it again with this number") from None
            if pool not in now:
                raise ValueError(f"--reward: {pool!r} given; this run has {', '.join(sorted(set(now) - {'rollout'}))}")
            print(f"{pool}: {size} actors asked for")
    return 0


def _reward_size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not re.fullmatch("[0-9]{1,18}", number):
        raise ValueError(f"--reward: {text!r} given; must look like NAME=N")
    return name, int(number)
