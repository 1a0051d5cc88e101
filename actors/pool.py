"""Supervision, membership and dispatch: a pool of like actors that outlives each of them."""

import asyncio
import heapq
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError

from actors.members import Call, Member, Members
from g2rpo_ray.config import Resources
from g2rpo_ray.types import Place
from g2rpo_ray.words import one_line

logger = logging.getLogger(__name__)

MOST_STARTS = 5  # of an actor that dies without a word before it is ready
TELL_EVERY_S = 30.0  # seconds between two lines about missing actors

Spawn = Callable[[str], ActorHandle]


class PoolStopped(RuntimeError):
    """A pool that can't go on: its actors fail to start, or died more often than allowed."""


def is_lost_object(error: BaseException) -> bool:
    """Whether an error says that an object went with the node that held it; what made it can make it again."""
    return isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError)


def here() -> Place:
    """The place of the process that asks: what an actor's `ready` returns."""
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())


class Counter:
    """Counts events, or seconds, in all and since they were last reported."""

    def __init__(self) -> None:
        self.total = 0.0
        self._reported = 0.0

    def add(self, events: float = 1) -> None:
        self.total += events

    def take(self) -> float:
        """Events since the last call of `take`."""
        new, self._reported = self.total - self._reported, self.total
        return new


class Pool:
    """Gives each idle actor the most urgent call; replaces an actor that died and sends its calls again.

    Ray's own restarts would lose the call that was in flight. What a call gives depends on its arguments alone, so it
    does not matter which actor gets it, in which order, or how often.

    An actor has one call in flight, and a second one, whose arguments Ray fetches meanwhile, as long as many calls are
    waiting: a call that waits behind another could have gone to whoever is idle first. On paper, 64 actors that get
    their second call while more calls than actors wait lose 2 % of their time with the paper's 16 prompts.
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
        resources: Resources | None = None,
    ):
        """
        Args:
            size: actors asked for, all the time: those that find no place yet are a demand that an autoscaler sees.
            minimum: actors without which `wait_ready` waits; later one is enough.
            max_restarts: deaths, all together, that the pool survives.
            patience_s: seconds with too few actors after which the pool stops.
            max_unused: most calls that may be done or under way before `used` is called for one of them.
            resources: what an actor needs, to tell it where too few find a place.
        """
        self.name = name
        self.restarts = Counter()
        self.retried = Counter()
        self.lost_seconds = Counter()  # of actors, in calls that are done again
        self._spawn = spawn
        self.size = size
        """Actors asked for."""
        self._minimum = minimum
        self._max_restarts = max_restarts
        self._patience_s = patience_s
        self._max_unused = max_unused
        self._resources = resources or {}
        self._unused = 0
        self._calls: list[Call] = []  # a heap
        self._order = itertools.count()
        self._names = (f"{name}-{number}" for number in itertools.count())
        self._members = Members()
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
        staying = [member for member in self._members if not member.retiring]
        for _ in range(size - len(staying)):
            self._spawn_member()
        idlest = sorted(staying, key=lambda member: (member.place is not None, len(member.calls)))
        for member in idlest[: max(0, len(staying) - size)]:
            self._retire(member)

    def leave(self, nodes: Collection[str]) -> None:
        """Move the actors off nodes that are about to go: others do at once what these had begun."""
        for member in [m for m in self._members if m.place and m.place.node in nodes]:
            logger.warning("%s moves, its node is about to go", member)
            self._end(member)
            if not member.retiring:
                self._spawn_member()

    def stop(self) -> None:
        """Serve no more, and end the actors."""
        for task in self._tasks:
            task.cancel()
        for member in self._members:
            ray.kill(member.handle)
            self._members.remove(member)

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each actor that is ready, by name."""
        return {member.name: member.place.pid for member in self._members if member.place}

    async def wait_ready(self) -> None:
        """Return as soon as `minimum` actors are ready to work."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.pids) >= self._minimum)
        self._minimum = 1

    async def call(self, method: str, *args: Any, priority: tuple[float, ...], what: str = "") -> tuple[list, Any]:
        """Have an actor do `method`: the references of all returns but the last, and the value of the last.

        `what` names the work in the log.

        The last return must be small: it alone comes to this process, and tells that the call is done.
        """
        done: asyncio.Future[tuple[list, Any]] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._calls, Call(priority, next(self._order), method, what or method, args, done))
        self._dispatch()
        return await done

    def used(self) -> None:
        """What one call left behind is used up: see `max_unused`."""
        self._unused -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        while self._max_unused is None or self._unused < self._max_unused:
            while self._calls and self._calls[0].done.cancelled():
                heapq.heappop(self._calls)
            member = self._members.next(len(self._calls))
            if member is None:
                break
            self._unused += 1
            call = heapq.heappop(self._calls)
            member.since = member.since if member.calls else time.monotonic()
            member.calls.append(call)
            self._members.shelve(member)
            self._task(self._follow(member, call))

    async def _follow(self, member: Member, call: Call) -> None:
        refs = getattr(member.handle, call.method).remote(*call.args)
        refs = refs if isinstance(refs, list) else [refs]
        try:
            answer = await refs[-1]
        except RayActorError as error:
            self._unused -= 1
            self.retried.add()
            logger.warning("%s: was on %s, is sent again", call.what, member)
            heapq.heappush(self._calls, call)
            self._lost(member, error)
        except Exception as error:
            self._unused -= 1
            logger.info("%s: failed on %s: %s", call.what, member, getattr(error, "cause", error))
            if not call.done.cancelled():
                call.done.set_exception(error)
        else:
            if not call.done.cancelled():
                call.done.set_result((refs[:-1], answer))
        member.calls.remove(call)
        member.since = time.monotonic()
        self._members.shelve(member)
        if member.retiring and not member.calls:
            self._end(member)
        self._dispatch()

    def _spawn_member(self, failures: tuple[str, ...] = ()) -> None:
        name = next(self._names)
        member = Member(name, self._spawn(name), failures=failures)
        self._members.add(member)
        self._task(self._await_ready(member))

    async def _await_ready(self, member: Member) -> None:
        try:
            member.place = await member.handle.ready.remote()
            self._members.shelve(member)
            logger.info("%s is ready", member)
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
            late = now - enough_at > self._patience_s
            if late or now - told_at > TELL_EVERY_S:
                told_at = now
                state = f"{len(self.pids)} of {self._minimum} actors ready after {now - enough_at:.0f} s"
                if late:
                    raise PoolStopped(f"{self.name}: {state}, longer than startup_timeout_s; {self._wanted()}")
                logger.warning("%s: %s; %s", self.name, state, self._wanted())

    def _wanted(self) -> str:
        """What an actor needs beside what there is."""
        there, free = ray.cluster_resources(), ray.available_resources()
        parts = [
            f"{amount:g} {kind} ({free.get(kind, 0):g} free of {there.get(kind, 0):g})"
            for kind, amount in self._resources.items()
            if amount
        ]
        return f"each needs {', '.join(parts) or 'nothing special'}; `ray status` shows what is waiting"

    def _retire(self, member: Member) -> None:
        member.retiring = True
        self._members.shelve(member)
        if not member.calls:
            self._end(member)

    def _end(self, member: Member) -> None:
        if self._members.remove(member):
            if member.calls:
                self.lost_seconds.add(time.monotonic() - member.since)
            ray.kill(member.handle)

    def _lost(self, member: Member, error: RayActorError) -> None:
        """Replace an actor that died; its other calls report the same death."""
        if member not in self._members:
            return
        self._end(member)
        if member.retiring:
            return
        reason = _reason(error)
        failures = () if member.place else (*member.failures, reason)
        by_itself = error.actor_init_failed or "exit code" in reason  # nobody killed it
        if (by_itself and reason in member.failures) or len(failures) == MOST_STARTS:
            raise PoolStopped(f"{member.name} failed to start, {len(failures)} times in a row: {reason}")
        self.restarts.add()
        logger.warning("%s %s: %s", member, "failed to start" if failures else "died", reason)
        if self.restarts.total > self._max_restarts:
            raise PoolStopped(f"{self.name}: more deaths than max_restarts={self._max_restarts}; the last: {reason}")
        self._spawn_member(failures)

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None, "start() comes first"
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _reason(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.actor_init_failed:
        return lines[-1]
    why = next((line for line in lines if "Worker exit detail: " in line), lines[0])
    return one_line(why.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0])
