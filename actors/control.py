"""External events of a run: resize requests, drained nodes, a lost head, a lost lease."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping

import ray
from ray._private.state import state  # as Ray Train does: no public API reports a drain

from g2rpo_ray.actors.cluster import ClusterLost, is_alive
from g2rpo_ray.actors.pool.failures import is_death
from g2rpo_ray.actors.pool.limits import Hung, in_thread, within
from g2rpo_ray.actors.pool.supervision import Supervisor
from g2rpo_ray.runs.lease import Lease

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
# for a head that restarts; at its own limit Ray ends the process without a message
HEAD_TIMEOUT_S = 0.75 * float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 Ray's name
NAME_TIMEOUT_S = 60.0  # until the name of a dead control actor is free
NAMESPACE = "g2rpo_ray"


@ray.remote(num_cpus=0)
class Control:
    """The queue of a run's resize requests. An async actor, so that `ask` runs while `next` waits."""

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = dict(sizes)
        self._asked: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    async def ask(self, pool: str, size: int) -> dict[str, int]:
        """Request another size of a pool; the requested sizes of all pools. An unknown pool is ignored."""
        if pool in self._sizes:
            self._sizes[pool] = size
            await self._asked.put((pool, size))
        return self._sizes

    async def next(self) -> tuple[str, int]:
        return await self._asked.get()


def control_name(run: str) -> str:
    return f"control/{run}"


async def follow_requests(run: str, pools: Mapping[str, Supervisor], say: Callable[[str], None]) -> None:
    """Resize the pools on request, while the run lasts; replaces a control actor that died.

    Raises:
        ValueError: the cluster has another run of this name.
    """
    while True:
        control = await _control(run, pools)
        try:
            while True:
                name, size = await control.next.remote()
                say(f"{name}: resized from {pools[name].size} to {size} actors")
                pools[name].resize(size)
        except Exception as error:
            if not is_death(error):
                raise
            await asyncio.sleep(POLL_INTERVAL_S)
        finally:
            ray.kill(control)


async def _control(run: str, pools: Mapping[str, Supervisor]) -> ray.actor.ActorHandle:
    """A new control actor. A dead one may still hold the name, since the head learns late of a dead node."""
    options = {"name": control_name(run), "namespace": NAMESPACE}
    until = time.monotonic() + NAME_TIMEOUT_S
    while True:
        sizes = {name: pool.size for name, pool in pools.items()}
        try:  # in a thread: a named actor waits for the head's answer
            return await in_thread(lambda: Control.options(**options).remote(sizes))  # type: ignore[attr-defined] # noqa: B023
        except ray.exceptions.ActorAlreadyExistsError:
            if time.monotonic() > until:
                raise ValueError(f"name: {run!r} is already running on this cluster; choose another name") from None
        await asyncio.sleep(POLL_INTERVAL_S)


async def follow_lease(lease: Lease) -> None:
    """Raise LeaseLost once another process has taken over the run."""
    while True:
        await asyncio.sleep(POLL_INTERVAL_S)
        lease.check()


async def follow_cluster(leave: Callable[[set[str]], None]) -> None:
    """Call `leave` with the ids of nodes that Ray drains: preempted, idle, or on request.

    Raises:
        ClusterLost: the head does not answer, or the node of this process is lost.
    """
    known: set[str] = set()
    while True:
        await asyncio.sleep(POLL_INTERVAL_S)
        try:
            draining, alive = await within(HEAD_TIMEOUT_S, "the head", in_thread(_look))
        except Hung as error:
            raise ClusterLost(str(error)) from None
        if not alive:
            raise ClusterLost("the node of this process died")
        if draining - known:
            leave(draining - known)
        known = draining


async def require_cluster() -> None:
    """Check the cluster before a restart: a process whose own node died cannot start actors, and may be killed.

    Raises:
        ClusterLost: as `follow_cluster`, which may not have noticed yet.
    """
    await asyncio.sleep(POLL_INTERVAL_S)  # the head notices a dead node a moment later
    try:
        alive = await within(HEAD_TIMEOUT_S, "the head", in_thread(is_alive))
    except Hung as error:
        raise ClusterLost(str(error)) from None
    if not alive:
        raise ClusterLost("the node of this process died")


def _look() -> tuple[set[str], bool]:
    while True:
        try:
            return set(state.get_draining_nodes()), is_alive()
        except Exception as error:  # the head restarts
            logger.warning("the head did not list the nodes: %s", str(error).split("\n")[0])
            time.sleep(POLL_INTERVAL_S)
