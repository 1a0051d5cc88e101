"""Membership and supervision: as many like actors as are asked for, whatever becomes of each of them."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RuntimeEnvSetupError

from actors.failures import exit_reason, in_thread, is_death
from actors.members import Member, Members
from actors.starts import LOOK_EVERY_S as LOOK_AT_STARTS_S
from actors.starts import Start, Starts
from g2rpo_ray.config import Resources
from g2rpo_ray.types import Place

logger = logging.getLogger(__name__)

TELL_EVERY_S = 30.0  # seconds between two lines about missing actors
LOOK_EVERY_S = 1.0  # for actors that are missing, hung or slow
STARTING = 32  # actors at most that are asked for and not ready: demand enough for an autoscaler
MOST_STARTS = 5  # of an actor that dies without a word before it is ready

Spawn = Callable[[str], ActorHandle]


class PoolStopped(RuntimeError):
    """A pool that can't go on: its actors fail to start, or died more often than allowed."""


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


class Crew:
    """The actors of a pool, each replaced when it dies. Ray's own restarts would lose the call that was in flight."""

    def __init__(
        self,
        name: str,
        spawn: Spawn,
        size: int,
        *,
        minimum: int = 1,
        max_restarts: int = 0,
        patience_s: float = 600.0,
        resources: Resources | None = None,
    ):
        """
        Args:
            size: actors asked for, all the time: those that find no place yet are a demand that an autoscaler sees.
            minimum: actors without which `wait_ready` waits; later one is enough.
            max_restarts: deaths, all together, that the pool survives.
            patience_s: seconds with too few actors after which the pool stops.
            resources: what an actor needs, to tell it where too few find a place.
        """
        self.name = name
        self.restarts = Counter()
        self.hung = Counter()
        self.lost_seconds = Counter()  # of actors, in calls that are done again
        self.size = size
        """Actors asked for."""
        self._spawn = spawn
        self._minimum = minimum
        self._max_restarts = max_restarts
        self._patience_s = patience_s
        self._resources = resources or {}
        self._starts = Starts(patience_s)
        self._failed_starts: list[str] = []  # why, since one was ready
        self._names = (f"{name}-{number}" for number in itertools.count())
        self._members = Members()
        self._changed = asyncio.Condition()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start the actors. A pool that can't go on raises PoolStopped in the group, which cancels who waits for it."""
        self._group = group
        self._task(self._watch())
        self._task(self._watch_starts())
        self.resize(self.size)

    def resize(self, size: int) -> None:
        """Have `size` actors from now on: more start, or some leave, those that are busy when their calls are done."""
        self.size = size
        staying = self._staying()
        idlest = sorted(staying, key=lambda member: (member.place is not None, len(member.calls)))
        for member in idlest[: max(0, len(staying) - size)]:
            self._retire(member)
        self._fill()

    def leave(self, nodes: Collection[str]) -> None:
        """Move the actors off nodes that are about to go: others do at once what these had begun."""
        for member in [m for m in self._members if m.place and m.place.node in nodes]:
            logger.warning("%s moves, its node is about to go", member)
            self._end(member)
        self._fill()

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

    @property
    def places(self) -> list[Place]:
        """Of the actors that are ready."""
        return [member.place for member in self._members if member.place]

    async def wait_ready(self) -> None:
        """Return as soon as `minimum` actors are ready to work."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.pids) >= self._minimum)
        self._minimum = 1

    def _staying(self) -> list[Member]:
        return [member for member in self._members if not member.retiring]

    def _fill(self) -> None:
        """Ask for the actors that are missing, some at a time: each that waits costs this process and the cluster."""
        staying = self._staying()
        starting = sum(member.place is None for member in staying)
        for _ in range(min(self.size - len(staying), STARTING - starting)):
            name = next(self._names)
            handle = self._spawn(name)
            member = Member(name, handle, Start([handle]))
            self._members.add(member)
            self._task(self._await_ready(member))

    async def _await_ready(self, member: Member) -> None:
        try:
            member.place = await member.handle.ready.remote()
            self._starts.took(member.start)
            self._members.shelve(member)
            self._failed_starts.clear()
            logger.info("%s is ready", member)
        except Exception as error:
            if not is_death(error):
                raise
            self._lost(member, error)
        async with self._changed:
            self._changed.notify_all()
        self._fill()
        self._dispatch()

    async def _watch(self) -> None:
        """Tell when actors are missing and for how long, and stop the pool when that was too long; see who hangs."""
        enough_at = told_at = time.monotonic()
        while True:
            await asyncio.sleep(min(LOOK_EVERY_S, self._patience_s))
            self._look()
            now = time.monotonic()
            if len(self.pids) >= self._minimum:
                enough_at = told_at = now
                continue
            late = now - enough_at > self._patience_s
            if late or now - told_at > TELL_EVERY_S:
                told_at = now
                state = f"{len(self.pids)} of {self._minimum} actors ready after {now - enough_at:.0f} s"
                wanted = await in_thread(self._wanted)  # does not come back while the head is gone
                if late:
                    raise PoolStopped(f"{self.name}: {state}, longer than startup_timeout_s; {wanted}")
                logger.warning("%s: %s; %s", self.name, state, wanted)

    async def _watch_starts(self) -> None:
        """Replace the actors whose start stands still."""
        while True:
            await asyncio.sleep(LOOK_AT_STARTS_S)
            for member in [member for member in self._members if member.place is None]:
                await member.start.look()
                if member.place is None and (reason := self._starts.hung(member.start)):
                    self._replace_hung(member, reason)

    def _replace_hung(self, member: Member, reason: str) -> None:
        self.hung.add()
        logger.warning("%s is taken for hung: %s", member, reason)
        self._end(member)  # its calls report a death now
        self._count_restart(reason)
        self._fill()

    def _wanted(self) -> str:
        """What an actor needs beside what there is; blocks."""
        there, free = ray.cluster_resources(), ray.available_resources()
        parts = [
            f"{amount:g} {kind} ({free.get(kind, 0):g} free of {there.get(kind, 0):g})"
            for kind, amount in self._resources.items()
            if amount
        ]
        return f"each needs {', '.join(parts) or 'nothing special'}; `ray status` shows what is waiting"

    def _look(self) -> None:
        """What else is to be seen to, every second."""

    def _dispatch(self) -> None:
        """Somebody may be there for a call that waits."""

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

    def _lost(self, member: Member, error: Exception) -> None:
        """Replace an actor that died; its other calls report the same death."""
        if member not in self._members:
            return
        self._end(member)
        if member.retiring:
            return
        reason = exit_reason(error)
        logger.warning("%s %s: %s", member, "died" if member.place else "failed to start", reason)
        if member.place is None:
            self._check_start(member, error, reason)
        self._count_restart(reason)
        self._fill()

    def _check_start(self, member: Member, error: Exception, reason: str) -> None:
        """Stop the pool where another start would fail as this one did."""
        if "node has died" in str(error) or getattr(error, "preempted", False):
            return
        failed = getattr(error, "actor_init_failed", False) or isinstance(error, RuntimeEnvSetupError)
        by_itself = failed or "exit code" in reason  # nobody killed it
        again = by_itself and reason in self._failed_starts
        self._failed_starts.append(reason)
        if again or len(self._failed_starts) == MOST_STARTS * min(self.size, STARTING):
            times = len(self._failed_starts)
            raise PoolStopped(f"{member.name} failed to start, {times} times in a row: {reason}")

    def _count_restart(self, reason: str) -> None:
        self.restarts.add()
        if self.restarts.total > self._max_restarts:
            raise PoolStopped(f"{self.name}: more deaths than max_restarts={self._max_restarts}; the last: {reason}")

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None, "start() comes first"
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
