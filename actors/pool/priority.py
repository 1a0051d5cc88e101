"""Placement priority: the learner first, then each pool's minimum; actors above a minimum make room for them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import ray
from ray._private.state import available_resources_per_node  # a DeveloperAPI, as exact as what Ray's scheduler sees

from g2rpo_ray.actors.pool.limits import in_thread, now
from g2rpo_ray.actors.pool.packing import Amounts, fits

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 2.0  # of the check for actors without a place
GIVE_WAY_AFTER_S = 20.0  # without a process; starting one takes seconds on a busy machine


class Claimant(Protocol):
    """The learner or a pool, which may need room."""

    name: str

    @property
    def resources(self) -> Amounts:
        """Ray resources of each actor."""

    @property
    def waiting(self) -> int:
        """Number of actors that it needs and that have no process."""


class Giver(Protocol):
    """A pool, which can release actors above its minimum."""

    def give_way(self, count: int, nodes: Mapping[str, Amounts], to: str) -> int:
        """Request no actor above the minimum until `resume`, and end up to `count` on the nodes; how many end."""

    def resume(self) -> None:
        """Request all actors again."""


async def full_nodes(needs: Amounts) -> Mapping[str, Amounts]:
    """Resources, by Ray's node id, of the nodes that would have room for such an actor if they were empty.

    Empty if a node has room now: Ray has yet to start the actor there. Empty while the head restarts.
    """
    try:
        free, nodes = await in_thread(lambda: (available_resources_per_node(), ray.nodes()))
    except Exception:  # the head restarts
        return {}
    if any(fits(needs, amounts) for amounts in free.values()):
        return {}
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"] and fits(needs, node["Resources"])}


async def make_room(
    claimants: Sequence[Claimant],
    givers: Sequence[Giver],
    nodes: Callable[[Amounts], Awaitable[Mapping[str, Amounts]]] = full_nodes,
) -> None:
    """Make givers release actors for claimants that have had no place for `GIVE_WAY_AFTER_S`, in the given order.

    Ray gives a free place to any actor that fits. Without this, an actor above the minimum may take the place that the
    learner waits for. `nodes` finds the nodes where actors would have to be released.
    """
    since: dict[str, float] = {}  # when the claimant began to wait, or others gave way to it
    while True:
        await asyncio.sleep(POLL_INTERVAL_S)
        for claimant in claimants:
            if not claimant.waiting:
                since.pop(claimant.name, None)
            elif now() - since.setdefault(claimant.name, now()) > GIVE_WAY_AFTER_S:
                _give_way(claimant, givers, await nodes(claimant.resources))
                since[claimant.name] = now()
        if not since:
            for giver in givers:
                giver.resume()


def _give_way(claimant: Claimant, givers: Sequence[Giver], nodes: Mapping[str, Amounts]) -> None:
    missing = claimant.waiting
    for giver in givers:
        if giver is not claimant:
            missing -= giver.give_way(missing, nodes, claimant.name)


async def wanted(needs: Amounts) -> str:
    """What an actor needs and what the cluster has, in words; blocks while the head is down."""
    try:
        there, free = await in_thread(lambda: (ray.cluster_resources(), ray.available_resources()))
    except Exception:  # the head restarts
        return "the head of the cluster does not answer"
    parts = [
        f"{amount:g} {kind} ({free.get(kind, 0):g} free of {there.get(kind, 0):g})"
        for kind, amount in needs.items()
        if amount
    ]
    return f"each needs {', '.join(parts) or 'no resources'}; one that has them may still be starting"
