"""Supervision, membership and dispatch: a pool of like actors that outlives each of them."""

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError

logger = logging.getLogger(__name__)

TELL_EVERY_S = 30.0  # seconds between two lines about missing actors

Spawn = Callable[[str], ActorHandle]


class PoolStopped(RuntimeError):
    """A pool that can't go on: its actors fail to start, or died more often than allowed."""


def is_lost_object(error: BaseException) -> bool:
    """Whether an error says that an object went with the node that held it; what made it can make it again."""
    return isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError)


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


@dataclass(slots=True)
class _Member:
    name: str
    handle: ActorHandle
    pid: int | None = None  # once it is ready
    in_flight: int = 0
    retiring: bool = False


class Pool:
    """Gives each idle actor the most urgent call; replaces an actor that died and sends its calls again.

    Ray's own restarts would lose the call that was in flight. What a call gives depends on its arguments alone, so it
    does not matter which actor gets it, in which order, or how often.

    An actor has one call in flight, and a second one, whose arguments Ray fetches meanwhile, as long as there are more
    calls waiting than actors: at the end of an iteration no call waits behind another.
    """

    def __init__(
        self,
        name: str,
        spawn: Spawn,
        size: int,
        *,
        minimum: int = 1,
        max_restarts: int = 0,
        patience_s: float = 600.0,
        max_unused: int | None = None,
    ):
        """
        Args:
            size: actors asked for, all the time: those that find no place yet are a demand that an autoscaler sees.
            minimum: actors without which `wait_ready` waits; later one is enough.
            max_restarts: deaths, all together, that the pool survives.
            patience_s: seconds with too few actors after which the pool stops.
            max_unused: most calls that may be done or under way before `used` is called for one of them.
        """
        self.name = name
        self.restarts = Counter()
        self.retried = Counter()
        self._spawn = spawn
        self.size = size
        """Actors asked for."""
        self._minimum = minimum
        self._max_restarts = max_restarts
        self._patience_s = patience_s
        self._max_unused = max_unused
        self._unused = 0
        self._calls: list[_Call] = []  # a heap
        self._order = itertools.count()
        self._names = (f"{name}-{number}" for number in itertools.count())
        self._members: dict[str, _Member] = {}
        self._changed = asyncio.Condition()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start the actors. A pool that can't go on raises PoolStopped in the group, which cancels who waits for it."""
        self._group = group
        self._task(self._watch())
        self.resize(self.size)

    def resize(self, size: int) -> None:
        """Have `size` actors from now on: more start, or some leave, those that are busy when their calls are done."""
        self.size = size
        staying = [member for member in self._members.values() if not member.retiring]
        for _ in range(size - len(staying)):
            self._spawn_member()
        idlest = sorted(staying, key=lambda member: (member.pid is not None, member.in_flight))
        for member in idlest[: max(0, len(staying) - size)]:
            self._retire(member)

    def stop(self) -> None:
        """Serve no more, and end the actors."""
        for task in self._tasks:
            task.cancel()
        for member in self._members.values():
            ray.kill(member.handle)
        self._members.clear()

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each actor that is ready, by name."""
        return {member.name: member.pid for member in self._members.values() if member.pid is not None}

    async def wait_ready(self) -> None:
        """Return as soon as `minimum` actors are ready to work."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.pids) >= self._minimum)
        self._minimum = 1

    async def call(self, method: str, *args: Any, priority: tuple[float, ...], returns: int = 1) -> tuple[list, Any]:
        """Have an actor do `method`: the references of all returns but the last, and the value of the last.

        The last return must be small: it alone comes to this process, and tells that the call is done.
        """
        done: asyncio.Future[tuple[list, Any]] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._calls, _Call(priority, next(self._order), method, args, returns, done))
        self._dispatch()
        return await done

    def used(self) -> None:
        """What one call left behind is used up: see `max_unused`."""
        self._unused -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        ready = [member for member in self._members.values() if member.pid is not None and not member.retiring]
        for in_flight in (0, 1):
            for member in ready:
                self._drop_cancelled()
                enough = len(self._calls) > (len(ready) if in_flight else 0)
                room = self._max_unused is None or self._unused < self._max_unused
                if member.in_flight == in_flight and enough and room:
                    member.in_flight += 1
                    self._unused += 1
                    self._task(self._follow(member, heapq.heappop(self._calls)))

    def _drop_cancelled(self) -> None:
        while self._calls and self._calls[0].done.cancelled():
            heapq.heappop(self._calls)

    async def _follow(self, member: _Member, call: _Call) -> None:
        refs = getattr(member.handle, call.method).options(num_returns=call.returns).remote(*call.args)
        refs = refs if isinstance(refs, list) else [refs]
        try:
            answer = await refs[-1]
        except RayActorError as error:
            self._unused -= 1
            self.retried.add()
            heapq.heappush(self._calls, call)
            self._lost(member, error)
        except Exception as error:
            self._unused -= 1
            if not call.done.cancelled():
                call.done.set_exception(error)
        else:
            if not call.done.cancelled():
                call.done.set_result((refs[:-1], answer))
        member.in_flight -= 1
        if member.retiring and not member.in_flight:
            self._end(member)
        self._dispatch()

    def _spawn_member(self) -> None:
        name = next(self._names)
        member = _Member(name, self._spawn(name))
        self._members[name] = member
        self._task(self._await_ready(member))

    async def _await_ready(self, member: _Member) -> None:
        try:
            member.pid = await member.handle.ready.remote()
        except RayActorError as error:
            self._lost(member, error)
        async with self._changed:
            self._changed.notify_all()
        self._dispatch()

    async def _watch(self) -> None:
        """Tell when actors are missing and for how long, and stop the pool when that was too long."""
        enough_at = told_at = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._patience_s))
            now = time.monotonic()
            if len(self.pids) >= self._minimum:
                enough_at = told_at = now
                continue
            state = f"{self.name}: {len(self.pids)} of {self._minimum} actors ready after {now - enough_at:.0f} s"
            if now - enough_at > self._patience_s:
                raise PoolStopped(
                    f"{state}, longer than startup_timeout_s; does the cluster have what `resources` asks for? "
                    "`ray status` shows what is waiting"
                )
            if now - told_at > TELL_EVERY_S:
                told_at = now
                logger.warning("%s; `ray status` shows what the cluster lacks", state)

    def _retire(self, member: _Member) -> None:
        member.retiring = True
        if not member.in_flight:
            self._end(member)

    def _end(self, member: _Member) -> None:
        if self._members.pop(member.name, None):
            ray.kill(member.handle)

    def _lost(self, member: _Member, error: RayActorError) -> None:
        """Replace an actor that died; its other calls report the same death."""
        if member.name not in self._members:
            return
        self._end(member)
        if member.retiring:
            return
        reason = _reason(error)
        if error.actor_init_failed:
            raise PoolStopped(f"{member.name} failed to start: {reason}")
        self.restarts.add()
        logger.warning("%s died: %s", member.name, reason)
        if self.restarts.total > self._max_restarts:
            raise PoolStopped(f"{self.name}: more deaths than max_restarts={self._max_restarts}; the last: {reason}")
        self._spawn_member()

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None, "start() comes first"
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _reason(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if error.actor_init_failed else lines[0]
