"""Supervision: keeps a pool at its size. Starts, resizes and ends actors, and replaces those that die or hang."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any

from ray.exceptions import RuntimeEnvSetupError

from g2rpo_ray.actors.pool.actor import Actor
from g2rpo_ray.actors.pool.device_faults import Quarantine, device_fault
from g2rpo_ray.actors.pool.failures import exit_reason, is_death
from g2rpo_ray.actors.pool.limits import Starts, now
from g2rpo_ray.actors.pool.members import Member
from g2rpo_ray.actors.pool.packing import Amounts, fits
from g2rpo_ray.actors.pool.priority import wanted
from g2rpo_ray.config import Resources
from g2rpo_ray.types import Place
from g2rpo_ray.version import code_version

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 30.0  # between two lines about missing actors
POLL_INTERVAL_S = 1.0  # of the checks for missing, hung and late actors
MAX_STARTING = 32  # actors that start at a time; enough demand for an autoscaler
MAX_SILENT_CRASHES = 5  # start-ups in a row, for each actor, that crash without an error

Spawn = Callable[[str], Actor]


class PoolStopped(RuntimeError):
    """A pool cannot continue: its actors fail to start, or died more often than `max_restarts`."""


class Counter:
    """Counts events or seconds: the total, and those since the last `take`."""

    def __init__(self) -> None:
        self.total = 0.0
        self._reported = 0.0

    def add(self, events: float = 1) -> None:
        self.total += events

    def take(self) -> float:
        """Events since the last call of `take`."""
        new, self._reported = self.total - self._reported, self.total
        return new


class Supervisor:
    """Keeps a pool at its size. Ray's own restarts are not used: they would lose the running call."""

    def __init__(
        self,
        name: str,
        spawn: Spawn,
        size: int,
        on_ready: Callable[[Member], None],
        *,
        minimum: int = 1,
        max_restarts: int = 0,
        patience_s: float = 600.0,
        resources: Resources | None = None,
        wanted: Callable[[Amounts], Awaitable[str]] = wanted,
    ):
        """
        Args:
            size: number of actors to request. Actors without a place stay requested, so that an autoscaler sees them.
            on_ready: called with each actor that becomes ready.
            minimum: number of ready actors that `wait_ready` waits for; afterwards it is 1.
            max_restarts: number of deaths, of all actors together, that the pool tolerates.
            patience_s: seconds with fewer than `minimum` ready actors after which the pool stops.
            resources: Ray resources of an actor, for messages and placement.
            wanted: describes what an actor needs and what the cluster has.
        """
        self.name = name
        self.restarts = Counter()
        self.hung = Counter()
        self.size = size
        """Number of requested actors."""
        self.resources = resources or {}
        """Ray resources of each actor."""
        self.members: list[Member] = []
        self._spawn, self._on_ready, self._wanted = spawn, on_ready, wanted
        self._minimum = minimum
        self._max_restarts = max_restarts
        self._patience_s = patience_s
        self._gives_way = False
        self._starts = Starts(patience_s)
        self._failed_starts: list[tuple[str, Any]] = []  # reasons and devices, since the last success
        self._names = (f"{name}-{number}" for number in itertools.count())
        self._quarantine = Quarantine()
        self._changed = asyncio.Condition()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start the actors. PoolStopped is raised in the group."""
        self._group = group
        self.run(self._watch())
        self._fill()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run this in the group until `cancel`."""
        assert self._group is not None, "start() comes first"
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Stop all tasks of the pool."""
        for task in self._tasks:
            task.cancel()

    def stop(self) -> None:
        """End the actors, after `cancel`."""
        for member in list(self.members):
            self.end(member)
        self._quarantine.release()

    def resize(self, size: int) -> None:
        """Change the size: start more actors, or end some. Busy actors end after their running call."""
        self.size = size
        staying = self._staying()
        idlest = sorted(staying, key=lambda member: (member.ready, member.call is not None))
        for member in idlest[: max(0, len(staying) - size)]:
            self._retire(member)
        self._fill()

    @property
    def waiting(self) -> int:
        """Number of actors below the minimum that have no process."""
        return max(0, self._minimum - sum(member.place is not None for member in self._staying()))

    def give_way(self, count: int, nodes: Mapping[str, Amounts], to: str) -> int:
        """Make room for `to` on one of these nodes.

        Until `resume`, no actor above the minimum is requested. Actors above it that have no place are withdrawn. Up to
        `count` others on these nodes end after their running call.

        Args:
            nodes: resources of each node, by Ray's node id.

        Returns:
            The number of actors that end; 0 if no actor of this pool fits on these nodes.
        """
        shared = {node for node, there in nodes.items() if fits(self.resources, there)}
        if not shared:
            return 0
        self._gives_way = True
        staying = self._staying()
        surplus = max(0, len(staying) - self._minimum)
        withdrawn = [member for member in staying if member.place is None][:surplus]
        for member in withdrawn:
            self.end(member)
        ending = [member for member in self.members if member.retiring and member.node in shared]
        # node by node, so that several places on one node add up for a larger actor
        giving = sorted(
            (member for member in staying if member.node in shared),
            key=lambda member: (str(member.node), member.ready, member.call is not None),
        )[: max(0, min(count - len(ending), surplus - len(withdrawn)))]
        for member in giving:
            logger.warning("%s ends after its call, to make room for %s", member, to)
            self._retire(member)
        return len(ending) + len(giving)

    def resume(self) -> None:
        """Request all actors again, after `give_way`."""
        if self._gives_way:
            self._gives_way = False
            self._fill()

    def leave(self, nodes: Collection[str]) -> None:
        """Move the actors off nodes that are being drained; their running calls are retried at once."""
        for member in [member for member in self.members if member.node in nodes]:
            logger.warning("%s moves: its node is being drained", member)
            self.end(member)
        self._quarantine.release(nodes)
        self._fill()

    @property
    def places(self) -> dict[str, Place]:
        """Places of the ready actors, by name."""
        return {member.name: member.place for member in self.members if member.place and member.ready}

    async def wait_ready(self) -> None:
        """Wait until `minimum` actors are ready."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.places) >= self._minimum)
        self._minimum = 1

    def _staying(self) -> list[Member]:
        return [member for member in self.members if not member.retiring]

    def _fill(self) -> None:
        """Request missing actors, at most `MAX_STARTING` at a time: each request costs this process and the cluster."""
        staying = self._staying()
        starting = sum(not member.ready for member in staying)
        size = min(self.size, self._minimum) if self._gives_way else self.size
        for _ in range(min(size - len(staying), MAX_STARTING - starting)):
            name = next(self._names)
            member = Member(name, self._spawn(name))
            self.members.append(member)
            self.run(self._start(member))

    async def _start(self, member: Member) -> None:
        try:
            member.place = await member.actor.call("where", code_version())[0]
            member.since = now()
            member.place = await member.actor.call("ready")[0]
            member.ready = True
        except Exception as error:
            self.lost(member, error)
        else:
            self._starts.took(now() - member.since)
            self._failed_starts.clear()
            logger.info("%s is ready", member)
            self._on_ready(member)
        async with self._changed:
            self._changed.notify_all()
        self._fill()

    async def _watch(self) -> None:
        """Log missing actors, stop the pool when they are missing for too long, and find hung starts."""
        enough_at = logged_at = now()
        while True:
            await asyncio.sleep(min(POLL_INTERVAL_S, self._patience_s))
            self._find_hung_starts()
            if len(self.places) >= self._minimum:
                enough_at = logged_at = now()
                continue
            missing_s = now() - enough_at
            late = missing_s > self._patience_s
            if late or now() - logged_at > LOG_INTERVAL_S:
                logged_at = now()
                state = f"{len(self.places)} of {self._minimum} actors ready after {missing_s:.0f} s"
                needs = await self._wanted(self.resources) if self.waiting else "all have started and are loading"
                if late:
                    raise PoolStopped(f"{self.name}: {state}, longer than startup_timeout_s; {needs}")
                logger.warning("%s: %s; %s", self.name, state, needs)

    def _find_hung_starts(self) -> None:
        for member in [member for member in self.members if member.place and not member.ready]:
            if reason := self._starts.hung(now() - member.since):
                self.replace_hung(member, reason)

    def replace_hung(self, member: Member, reason: str) -> None:
        self.hung.add()
        logger.warning("%s hung: %s", member, reason)
        self.end(member)  # its running call fails with a death
        self._count_restart(reason)
        self._fill()

    def _retire(self, member: Member) -> None:
        member.retiring = True
        if not member.call:
            self.end(member)

    def end(self, member: Member, error: Exception | None = None) -> None:
        """End an actor, unless its error quarantines its device."""
        if member.ended:
            return
        member.ended = True
        self.members.remove(member)
        if error is None or not self._quarantine.holds(error, member.actor):
            member.actor.end()

    def lost(self, member: Member, error: Exception) -> None:
        """Replace an actor that died, or failed to start."""
        if member.ended:
            return
        self.end(member, error)
        if member.retiring:
            return
        reason = exit_reason(error)
        logger.warning("%s %s: %s", member, "died" if member.ready else "failed to start", reason)
        if not member.ready:
            self._check_start(member, error, reason)
        self._count_restart(reason)
        self._fill()

    def _check_start(self, member: Member, error: Exception, reason: str) -> None:
        """Stop the pool if another start would fail in the same way."""
        if "node has died" in str(error) or getattr(error, "preempted", False):
            return
        raised = not is_death(error) or getattr(error, "actor_init_failed", False)
        by_itself = raised or isinstance(error, RuntimeEnvSetupError) or "exit code" in reason  # not killed
        fault = device_fault(error)
        device = (fault.node, fault.device) if fault else None
        before = [on for why, on in self._failed_starts if why == reason]
        # a failed device says nothing about other devices
        again = any(on != device for on in before) if fault else by_itself and bool(before)
        self._failed_starts.append((reason, device))
        if again or len(self._failed_starts) == MAX_SILENT_CRASHES * min(self.size, MAX_STARTING):
            times = len(self._failed_starts)
            raise PoolStopped(f"{member.name} failed to start, {times} times in a row: {reason}")

    def _count_restart(self, reason: str) -> None:
        self.restarts.add()
        if self.restarts.total > self._max_restarts:
            raise PoolStopped(f"{self.name}: more deaths than max_restarts={self._max_restarts}; last: {reason}")
