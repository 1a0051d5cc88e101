"""What changes a run from outside while it goes on: sizes that somebody asks for, nodes that are about to go."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping

import ray
from ray._private.state import state  # what Ray Train asks, too: there is no public way to hear of a drain

from actors.cluster import ClusterLost, is_alive
from actors.failures import Hung, in_thread, is_death, within
from actors.pool import Pool
from g2rpo_ray.record.lease import Lease

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # for nodes that are about to go
# for a head that restarts; at the end of its own limit Ray ends the process, without a word
HEAD_S = 0.75 * float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 Ray's name
FREE_S = 60.0  # after which the name of a control actor that died is free
NAMESPACE = "g2rpo_ray"


@ray.remote(num_cpus=0)
class Control:
    """Where a run's requests wait for it. An async actor: `next` waits while `ask` comes in."""

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = dict(sizes)
        self._asked: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    async def ask(self, pool: str, size: int) -> dict[str, int]:
        """Ask for a pool of another size; the sizes asked for by now. An unknown pool changes nothing."""
        if pool in self._sizes:
            self._sizes[pool] = size
            await self._asked.put((pool, size))
        return self._sizes

    async def next(self) -> tuple[str, int]:
        return await self._asked.get()


def control_name(run: str) -> str:
    return f"control/{run}"


async def follow_requests(run: str, pools: Mapping[str, Pool], say: Callable[[str], None]) -> None:
    """Resize the pools as asked, for as long as the run goes on; a control actor that died is replaced.

    Raises:
        ValueError: another run of this name is on the cluster.
    """
    while True:
        control = await _control(run, pools)
        try:
            while True:
                name, size = await control.next.remote()
                say(f"{name}: {pools[name].size} actors were asked for, now {size}")
                pools[name].resize(size)
        except Exception as error:
            if not is_death(error):
                raise
            await asyncio.sleep(LOOK_EVERY_S)
        finally:
            ray.kill(control)


async def _control(run: str, pools: Mapping[str, Pool]) -> ray.actor.ActorHandle:
    """A new control actor. The one before may have the name still: a head learns late of a node that went with it."""
    options = {"name": control_name(run), "namespace": NAMESPACE}
    until = time.monotonic() + FREE_S
    while True:
        sizes = {name: pool.size for name, pool in pools.items()}
        try:  # in a thread: a named actor waits for the head's answer
            return await in_thread(lambda: Control.options(**options).remote(sizes))  # type: ignore[attr-defined] # noqa: B023
        except ray.exceptions.ActorAlreadyExistsError:
            if time.monotonic() > until:
                raise ValueError(f"name: a run called {run!r} works on this cluster; give this one another") from None
        await asyncio.sleep(LOOK_EVERY_S)


async def follow_lease(lease: Lease) -> None:
    """Raise LeaseLost soon after another process has taken the run over."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        lease.check()


async def follow_cluster(leave: Callable[[set[str]], None]) -> None:
    """Call `leave` with the ids of nodes that Ray is about to drain: preempted, idle, or asked to.

    Raises:
        ClusterLost: the head does not answer, or the node of this process is gone.
    """
    known: set[str] = set()
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        try:
            draining, alive = await within(HEAD_S, "the head", in_thread(_look))
        except Hung as error:
            raise ClusterLost(str(error)) from None
        if not alive:
            raise ClusterLost("the node of this process is gone")
        if draining - known:
            leave(draining - known)
        known = draining


async def require_cluster() -> None:
    """Before anything is started again: a process whose own node is gone can start nothing, and may end at the try.

    Raises:
        ClusterLost: as `follow_cluster`, which may not have seen it yet.
    """
    await asyncio.sleep(LOOK_EVERY_S)  # the head learns of a dead node a moment later than who talked to it
    try:
        alive = await within(HEAD_S, "the head", in_thread(is_alive))
    except Hung as error:
        raise ClusterLost(str(error)) from None
    if not alive:
        raise ClusterLost("the node of this process is gone")


def _look() -> tuple[set[str], bool]:
    while True:
        try:
            return set(state.get_draining_nodes()), is_alive()
        except Exception as error:  # the head restarts
            logger.warning("cannot see the cluster's nodes: %s", str(error).split("\n")[0])
            time.sleep(LOOK_EVERY_S)
