"""`python -m g2rpo_ray.scale`: change the number of rollout actors or reward servers of a run that is going on."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from g2rpo_ray.config import load_config

INVALID = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 invalid input."""
    options = make_parser().parse_args(arguments)
    try:
        sizes = {"rollout": options.rollout} if options.rollout is not None else {}
        sizes.update(_reward_size(text) for text in options.reward)
        if not sizes or min(sizes.values()) < 1:
            raise ValueError("--rollout N or --reward NAME=N: give at least one, with N from 1 up")
        return _ask(options.name, options.address, sizes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return INVALID


def _ask(run: str, address: str | None, sizes: dict[str, int]) -> int:
    from actors.cluster import cluster

    with cluster(address or os.environ.get("RAY_ADDRESS", "auto")):
        import ray

        from actors.control import NAMESPACE, control_name

        try:
            control = ray.get_actor(control_name(run), namespace=NAMESPACE)
        except ValueError:
            raise ValueError(f"--name: no run {run!r} is going on on this cluster") from None
        for pool, size in sizes.items():
            asked: Any = control.ask.remote(pool, size)  # a named actor has no type
            now = ray.get(asked)
            if pool not in now:
                raise ValueError(f"--reward: {pool!r} given; this run has {', '.join(sorted(set(now) - {'rollout'}))}")
            print(f"{pool}: {size} actors asked for")
    return 0


def _reward_size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdigit():
        raise ValueError(f"--reward: {text!r} given; must look like NAME=N")
    return name, int(number)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m g2rpo_ray.scale",
        description="Change the size of a running job.",
        epilog="example: python -m g2rpo_ray.scale --name flux_hps --rollout 12 --reward hpsv2=2",
    )
    parser.add_argument("--name", default=load_config().name, help="name of the run (default: the quickstart's)")
    parser.add_argument("--rollout", metavar="N", type=int, help="rollout actors")
    parser.add_argument("--reward", metavar="NAME=N", action="append", default=[], help="servers of a reward")
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else the one started here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
