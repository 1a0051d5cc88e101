"""Supervision, membership and dispatch: a pool of like actors that outlives each of them."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

logger = logging.getLogger(__name__)

Spawn = Callable[[str], ActorHandle]


class PoolStopped(RuntimeError):
    """A pool that can't go on: its actors fail to start, or died more often than allowed."""


class Counter:
    """Counts events, in all and since they were last reported."""

    def __init__(self) -> None:
        self.total = 0
        self._reported = 0

    def add(self, events: int = 1) -> None:
        self.total += events

    def take(self) -> int:
        """Events since the last call of `take`."""
        new, self._reported = self.total - self._reported, self.total
        return new


@dataclass(order=True, slots=True)
class _Call:
    priority: tuple[float, ...]  # the smallest goes first
    order: int  # then the oldest
    method: str = field(compare=False)
    args: tuple[Any, ...] = field(compare=False)
    returns: int = field(compare=False)
    done: asyncio.Future = field(compare=False)


class Pool:
    """Gives each idle actor the most urgent call; replaces an actor that died and sends its call again.

    Ray's own restarts would lose the call that was in flight. One call is in flight at an actor; what it gives depends
    on its arguments alone, so it does not matter which actor gets it, in which order, or how often.
    """

    def __init__(self, name: str, spawn: Spawn, size: int, max_restarts: int, credits: asyncio.Semaphore | None = None):
        """`credits`: taken for each call that starts; whoever uses up what the call left gives it back."""
        self.name = name
        self.restarts = Counter()
        self.retried = Counter()
        self.pids: dict[str, int] = {}
        """Process id of each actor that is ready, by actor name."""
        self._spawn = spawn
        self._size = size
        self._max_restarts = max_restarts
        self._credits = credits
        self._queue: asyncio.PriorityQueue[_Call] = asyncio.PriorityQueue()
        self._order = itertools.count()
        self._names = (f"{name}-{number}" for number in itertools.count())
        self._one_is_ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start the actors and serve calls, in a task of the group for each actor.

        A pool that can't go on raises PoolStopped there, which cancels whoever waits for an answer.
        """
        self._tasks = [group.create_task(self._keep_one_actor()) for _ in range(self._size)]

    def stop(self) -> None:
        """Serve no more, and end the actors."""
        for task in self._tasks:
            task.cancel()

    async def wait_ready(self, timeout_s: float) -> None:
        """Return as soon as one actor is ready to work.

        Raises:
            PoolStopped: none was within `timeout_s` seconds.
        """
        try:
            await asyncio.wait_for(self._one_is_ready.wait(), timeout_s)
        except TimeoutError:
            raise PoolStopped(
                f"{self.name}: no actor started within startup_timeout_s={timeout_s:g}; does the cluster have the "
                "resources that the configuration asks for? `ray status` shows what is waiting"
            ) from None

    async def call(self, method: str, *args: Any, priority: tuple[float, ...], returns: int = 1) -> tuple[list, Any]:
        """Have an actor do `method`: the references of all returns but the last, and the value of the last.

        The last return must be small: it alone comes to this process, and tells that the call is done.
        """
        done: asyncio.Future[tuple[list, Any]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Call(priority, next(self._order), method, args, returns, done))
        return await done

    async def _keep_one_actor(self) -> None:
        while True:
            name = next(self._names)
            actor = self._spawn(name)
            try:
                self.pids[name] = await actor.ready.remote()
                self._one_is_ready.set()
                await self._serve(actor)
            except RayActorError as error:
                self._count_death(name, error)
            finally:
                self.pids.pop(name, None)
                ray.kill(actor)

    async def _serve(self, actor: ActorHandle) -> None:
        while True:
            if self._credits:
                await self._credits.acquire()
            call = await self._queue.get()
            refs = getattr(actor, call.method).options(num_returns=call.returns).remote(*call.args)
            refs = refs if isinstance(refs, list) else [refs]
            try:
                answer = await refs[-1]
            except RayActorError:
                self.retried.add()
                self._queue.put_nowait(call)
                if self._credits:
                    self._credits.release()
                raise
            except Exception as error:
                if not call.done.cancelled():
                    call.done.set_exception(error)
            else:
                if not call.done.cancelled():
                    call.done.set_result((refs[:-1], answer))

    def _count_death(self, name: str, error: RayActorError) -> None:
        reason = _reason(error)
        if error.actor_init_failed:
            raise PoolStopped(f"{name} failed to start: {reason}") from None
        self.restarts.add()
        logger.warning("%s died: %s", name, reason)
        if self.restarts.total > self._max_restarts:
            raise PoolStopped(f"{self.name}: more deaths than max_restarts={self._max_restarts}; the last: {reason}")


def _reason(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if error.actor_init_failed else lines[0]
