"""Dispatch: each idle actor of a pool gets the most urgent call, and no call is lost with an actor."""

import asyncio
import heapq
import itertools
import logging
import time
from typing import Any

from actors.crew import Counter, Crew, Spawn
from actors.failures import Hung, Patience, is_death
from actors.members import Call, Member

logger = logging.getLogger(__name__)

HUNG_CALLS = 3  # actors that may hang over one call


class Pool(Crew):
    """Gives each idle actor the most urgent call, and sends the calls of an actor that died again.

    What a call gives depends on its arguments alone: it does not matter which actor gets it, in which order, how often.

    An actor has one call in flight, and a second one, whose arguments Ray fetches meanwhile, as long as many calls are
    waiting: a call that waits behind another could have gone to whoever is idle first. On paper, 64 actors that get
    their second call while more calls than actors wait lose 2 % of their time with the paper's 16 prompts.

    An actor that takes much longer over a call than others do is taken for hung, and replaced as if it had died. When
    no call is waiting, idle actors do a second time what slow ones have in hand: the first answer counts.
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
            hung_after_s: seconds that a call may take in any case.
            peers: whether it may take less where others took much less; not so where some of them compile first.
            copies: whether idle actors do what slow ones have in hand, too.
            max_unused: most calls that may be done or under way before `used` is called for one of them.
            supervision: see `Crew`.
        """
        super().__init__(name, spawn, size, **supervision)
        self.retried = Counter()
        self.copied = Counter()
        self._hung_after_s, self._peers, self._copies = hung_after_s, peers, copies
        self._patience = Patience(hung_after_s)
        self._max_unused = max_unused
        self._unused = 0
        self._calls: list[Call] = []  # a heap
        self._order = itertools.count()

    async def call(
        self, method: str, *args: Any, priority: tuple[float, ...], what: str = "", cost: float = 1
    ) -> tuple[list, Any]:
        """Have an actor do `method`: the references of all returns but the last, and the value of the last.

        The last return must be small: it alone comes to this process, and tells that the call is done.

        Args:
            what: names the work in the log.
            cost: what the time of such calls grows with; late is who takes long for it.

        Raises:
            Hung: several actors, one after the other, did not come back with it.
        """
        done: asyncio.Future[tuple[list, Any]] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._calls, Call(priority, next(self._order), method, what or method, args, cost, done))
        self._dispatch()
        try:
            return await done
        except asyncio.CancelledError:
            if not done.cancelled() and not done.exception():  # it was done; nobody is left to use it
                self.used()
            raise

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
            self._send(member, heapq.heappop(self._calls))
        pace = self._patience.usual(1)
        while self._copies and not self._calls and pace and (late := self._members.copy(pace)):
            self.copied.add()
            logger.info("%s: %s is late, %s does it, too", late[1].what, self._holder(late[1]), late[0])
            self._send(*late)

    def _send(self, member: Member, call: Call) -> None:
        if not member.calls:
            member.begin()
        member.calls.append(call)
        call.holders += 1
        self._members.shelve(member)
        self._task(self._follow(member, call))

    async def _follow(self, member: Member, call: Call) -> None:
        refs = getattr(member.handle, call.method).remote(*call.args)
        refs = refs if isinstance(refs, list) else [refs]
        answer: tuple[list, Any] | None = None
        failure: Exception | None = None
        try:
            answer = refs[:-1], await refs[-1]
            seconds = time.monotonic() - member.since
            self._patience.took(seconds, call.cost)
            member.took(seconds, call.cost)
        except Exception as error:
            if is_death(error):
                self._lost(member, error)
            else:
                failure = error
                logger.info("%s: failed on %s: %s", call.what, member, getattr(error, "cause", error))
        member.calls.remove(call)
        member.begin()
        self._members.shelve(member)
        self._settle(call, answer, failure)
        if member.retiring and not member.calls:
            self._end(member)
        self._dispatch()

    def _settle(self, call: Call, answer: tuple[list, Any] | None, failure: Exception | None) -> None:
        """What becomes of a call that an actor is done with, one way or the other."""
        call.holders -= 1
        if call.done.cancelled():
            self._unused -= not call.holders
        elif call.done.done():  # by another actor
            pass
        elif answer:
            call.done.set_result(answer)
        elif failure:
            self._unused -= 1
            call.done.set_exception(failure)
        elif not call.holders:
            self._unused -= 1
            self.retried.add()
            logger.warning("%s: is sent again", call.what)
            heapq.heappush(self._calls, call)

    def _holder(self, call: Call) -> Member:
        return next(member for member in self._members if call in member.calls)

    def _look(self) -> None:
        self._find_hung()
        self._dispatch()  # somebody may be late by now

    def _find_hung(self) -> None:
        """Replace the actors that are at a call for much too long. The first of an actor may take the set time."""
        for member in [member for member in self._members if member.calls]:
            call, spent = member.calls[0], time.monotonic() - member.since
            by_peers = self._peers and member.pace is not None
            limit = (self._patience.limit(call.cost) if by_peers else self._hung_after_s) * 2**call.hung
            if spent > limit:
                self._hung_over(call)
                self._replace_hung(member, f"no answer for {spent:.0f} s to {call.what}")
            elif spent > limit / 2 and not member.told:
                member.told = True
                usual = self._patience.usual(call.cost)
                others = f"others take {usual:.1f} s" if usual else "nobody has done one yet"
                logger.warning("%s: %s for %.0f s, %s; hung after %.0f s", member, call.what, spent, others, limit)

    def _hung_over(self, call: Call) -> None:
        """Count an actor that hung over a call; nobody else is asked for one that several hung over."""
        call.hung += 1
        if call.hung == HUNG_CALLS and not call.done.done():
            self._unused -= 1
            call.done.set_exception(Hung(f"{call.what}: {HUNG_CALLS} actors hung over it, one after the other"))
