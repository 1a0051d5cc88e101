"""Dispatch: assigns the most urgent call to each idle actor, and retries the calls of actors that died."""

import asyncio
import heapq
import itertools
import logging
from collections import deque
from typing import Any

from g2rpo_ray.actors.pool.device_faults import MAX_FAULTY_ACTORS, device_fault
from g2rpo_ray.actors.pool.failures import is_death
from g2rpo_ray.actors.pool.limits import Hung, Patience, now
from g2rpo_ray.actors.pool.members import Call, Member
from g2rpo_ray.actors.pool.order import most_unused
from g2rpo_ray.actors.pool.supervision import POLL_INTERVAL_S, Counter, Spawn, Supervisor

logger = logging.getLogger(__name__)

MAX_HUNG_ACTORS = 3  # that may hang on one call
MIN_SPEEDUP = 2.0  # a call is repeated only if it still needs this many times as long as its copy


class Pool:
    """Assigns the most urgent call to each idle actor, and retries the calls of actors that died.

    A call must be a pure function of its arguments: any actor may run it, in any order, more than once. An actor runs
    one call at a time. An actor that exceeds the time limit of its call is hung and is replaced as if it had died. When
    no call is queued, idle actors repeat calls that are late on slow actors; the first result is used.
    """

    def __init__(
        self,
        name: str,
        spawn: Spawn,
        size: int,
        *,
        hung_after_s: float = 1800.0,
        peers: bool = True,
        copies: bool = False,
        max_unused: int | None = None,
        **supervision: Any,
    ):
        """
        Args:
            hung_after_s: time limit of a call, seconds, while no durations are known.
            peers: whether durations of other calls lower that limit; not for actors that compile in their first call.
            copies: whether idle actors repeat late calls.
            max_unused: largest number of calls that are running, or finished and not yet reported by `used`. It is at
                least two for each actor.
            supervision: see `Supervisor`.
        """
        self.name = name
        self.actors = Supervisor(name, spawn, size, self._free, **supervision)
        """Starts, replaces and ends the actors."""
        self.retried = Counter()
        self.copied = Counter()
        self.lost_seconds = Counter()  # that actors spent on calls that were retried
        self._hung_after_s, self._peers, self._copies = hung_after_s, peers, copies
        self._patience = Patience(hung_after_s)
        self._max_unused = max_unused
        self._unused = 0
        self._calls: list[Call] = []  # a heap
        self._order = itertools.count()
        self._idle: deque[Member] = deque()  # may contain ended members

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start the actors. A pool that cannot continue raises PoolStopped in the group, which cancels its tasks."""
        self.actors.start(group)
        self.actors.run(self._watch())

    def stop(self) -> None:
        """Stop dispatching, and end the actors."""
        self.actors.cancel()
        self.actors.stop()

    async def call(
        self,
        method: str,
        *args: Any,
        priority: tuple[float, ...],
        what: str = "",
        cost: float = 1,
        min_timeout_s: float = 0.0,
    ) -> tuple[list, Any]:
        """Call `method` on an actor.

        Args:
            priority: the smallest is assigned first; then the oldest call.
            what: name of the call in the log.
            cost: expected duration in any unit that is proportional to it, such as evaluations.
            min_timeout_s: lower bound of the time limit, seconds.

        Returns:
            References to all return values but the last, and the value of the last. The last one should be small, since
            this process fetches it.

        Raises:
            Hung: several actors in a row did not finish it in time.
        """
        done: asyncio.Future[tuple[list, Any]] = asyncio.get_running_loop().create_future()
        call = Call(priority, next(self._order), method, what or method, args, cost, min_timeout_s, done)
        heapq.heappush(self._calls, call)
        self._dispatch()
        try:
            return await done
        except asyncio.CancelledError:
            if not done.cancelled() and not done.exception():  # finished, but its result will not be used
                self.used()
            raise

    def used(self) -> None:
        """Report that the result of one call is used: see `max_unused`."""
        self._unused -= 1
        self._dispatch()

    def _free(self, member: Member) -> None:
        """Assign a call to an actor that became idle, or end it if it retires."""
        if member.retiring:
            self.actors.end(member)
        elif not member.ended:
            self._idle.append(member)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._has_room() and self._is_call_waiting() and (member := self._next_idle()):
            self._unused += 1
            self._send(heapq.heappop(self._calls), member)
        while self._copies and not self._calls and (late := self._late()):
            call, holder, taker = late
            self.copied.add()
            logger.info("%s is late on %s: %s repeats it", call.what, holder, taker)
            self._idle.remove(taker)
            self._send(call, taker)

    def _has_room(self) -> bool:
        """Whether `max_unused` allows another call. The pool may have been resized since the last one."""
        if self._max_unused is None:
            return True
        return self._unused < most_unused(self._max_unused, self.actors.size)

    def _is_call_waiting(self) -> bool:
        while self._calls and self._calls[0].done.cancelled():
            heapq.heappop(self._calls)
        return bool(self._calls)

    def _next_idle(self) -> Member | None:
        while self._idle:
            member = self._idle.popleft()
            if not member.ended:
                return member
        return None

    def _late(self) -> tuple[Call, Member, Member] | None:
        """The late call that gains most from a copy, its actor, and the idle actor to repeat it."""
        usual, idle = self._patience.usual(1), [member for member in self._idle if not member.ended]
        if not usual or not idle:
            return None
        taker = min(idle, key=lambda member: member.pace or usual)
        found, most = None, 0.0
        for member in self.actors.members:
            if (call := member.call) and call.holders == 1 and not call.done.done():
                gain = member.left_s(call, usual) - MIN_SPEEDUP * (taker.pace or usual) * call.cost
                if gain > most:
                    found, most = (call, member, taker), gain
        return found

    def _send(self, call: Call, member: Member) -> None:
        member.call, member.since, member.warned = call, now(), False
        call.holders += 1
        self.actors.run(self._follow(call, member))

    async def _follow(self, call: Call, member: Member) -> None:
        answer: tuple[list, Any] | None = None
        failure: Exception | None = None
        try:
            *refs, last = member.actor.call(call.method, *call.args)
            answer = refs, await last
            seconds = now() - member.since
            self._patience.took(seconds, call.cost)
            member.took(seconds, call.cost)
        except Exception as error:
            failure = self._failure(call, member, error)
        member.call = None
        self._settle(call, answer, failure)
        self._free(member)

    def _failure(self, call: Call, member: Member, error: Exception) -> Exception | None:
        """The exception of the call; None if its actor died, unless several devices failed on this call."""
        if not is_death(error):
            logger.info("%s: failed on %s: %s", call.what, member, getattr(error, "cause", error))
            return error
        self.lost_seconds.add(now() - member.since)
        self.actors.lost(member, error)
        call.faults += device_fault(error) is not None
        return error if call.faults == MAX_FAULTY_ACTORS else None

    def _settle(self, call: Call, answer: tuple[list, Any] | None, failure: Exception | None) -> None:
        """Finish or retry a call after one of its actors has finished, failed or died."""
        call.holders -= 1
        if call.done.cancelled():
            self._unused -= not call.holders
        elif call.done.done():  # finished by another actor
            pass
        elif answer:
            call.done.set_result(answer)
        elif failure:
            self._unused -= 1
            call.done.set_exception(failure)
        elif not call.holders:
            self._unused -= 1
            self.retried.add()
            logger.warning("%s: retried", call.what)
            heapq.heappush(self._calls, call)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            for member in list(self.actors.members):
                if member.call:
                    self._check_time(member.call, member)
            self._dispatch()  # a running call may have become late

    def _check_time(self, call: Call, member: Member) -> None:
        """Replace an actor that exceeds its time limit. The first call of an actor has `hung_after_s`."""
        spent = now() - member.since
        by_peers = self._peers and member.pace is not None
        limit = self._patience.limit(call.cost) if by_peers else self._hung_after_s
        limit = max(limit, call.min_timeout_s) * 2**call.hung
        if spent > limit:
            self._hung_over(call)
            self.actors.replace_hung(member, f"no answer for {spent:.0f} s to {call.what}")
        elif spent > limit / 2 and not member.warned:
            member.warned = True
            usual = self._patience.usual(call.cost)
            others = f"usually {usual:.1f} s" if usual else "usual duration unknown"
            logger.warning("%s: %s runs for %.0f s (%s; limit %.0f s)", member, call.what, spent, others, limit)

    def _hung_over(self, call: Call) -> None:
        """Count an actor that hung on a call; the call fails after `MAX_HUNG_ACTORS`."""
        call.hung += 1
        if call.hung == MAX_HUNG_ACTORS and not call.done.done():
            self._unused -= 1
            call.done.set_exception(Hung(f"{call.what}: {MAX_HUNG_ACTORS} actors in a row hung on it"))
