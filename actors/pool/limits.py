"""Time limits of calls and starts; beyond them an actor is hung."""

import asyncio
import statistics
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

MIN_TIMEOUT_S = 60.0  # of a call whose usual duration is known
TIMEOUT_FACTOR = 10.0  # time limit of a call, in usual durations
HISTORY = 50  # calls that the usual duration is the median of
GRACE_S = 20.0  # for a running call after a shutdown was requested, unless its usual duration is longer


class Hung(RuntimeError):
    """A call or a start exceeded its time limit."""


def now() -> float:
    """Seconds by the clock of the running event loop, which tests replace by a virtual one."""
    return asyncio.get_running_loop().time()


def in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """The result of `work`, run in a daemon thread, which may block for ever: unlike asyncio's, it is never joined."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(found: T | None, error: Exception | None) -> None:
        if not result.done():
            result.set_exception(error) if error else result.set_result(found)  # type: ignore[arg-type]

    def run() -> None:
        found = error = None
        try:
            found = work()
        except Exception as raised:
            error = raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, found, error)

    threading.Thread(target=run, daemon=True).start()
    return result


async def within(limit_s: float, what: str, work: Awaitable[T]) -> T:
    """The result of `work`.

    Raises:
        Hung: it did not finish within `limit_s` seconds. `what` names it in the message.
    """
    try:
        async with asyncio.timeout(limit_s):  # wait_for may lose a cancellation that arrives with the result
            return await work
    except TimeoutError:
        raise Hung(f"{what}: no answer after {limit_s:.0f} s") from None


class Patience:
    """The time limit of calls of one kind: a fixed one, then ten times the usual duration once that is known.

    The cost of a call is proportional to its expected duration: evaluations, images, states.
    """

    def __init__(self, limit_s: float, floor_s: float | None = None):
        self._limit_s, self._floor_s = limit_s, floor_s
        self._paces: deque[float] = deque(maxlen=HISTORY)

    def took(self, seconds: float, cost: float) -> None:
        self._paces.append(seconds / max(cost, 1))

    def usual(self, cost: float) -> float | None:
        """Usual duration of a call of this cost, seconds; None while unknown."""
        return statistics.median(self._paces) * max(cost, 1) if self._paces else None

    def limit(self, cost: float) -> float:
        """Time limit of a call of this cost, seconds."""
        usual, floor = self.usual(cost), MIN_TIMEOUT_S if self._floor_s is None else self._floor_s
        return self._limit_s if usual is None else min(self._limit_s, max(floor, TIMEOUT_FACTOR * usual))

    def ending(self, cost: float) -> float:
        """Time limit of a running call after a shutdown was requested, seconds."""
        return min(self.limit(cost), max(GRACE_S, 3 * (self.usual(cost) or 0)))


class Starts:
    """Detects actors that hang while they start. A start begins with its process, not with the wait for resources."""

    def __init__(self, limit_s: float):
        """`limit_s`: time limit of the first start, seconds; later ones have at least half, as disks may be cold."""
        self._patience = Patience(limit_s, limit_s / 2)

    def took(self, seconds: float) -> None:
        self._patience.took(seconds, 1)

    def hung(self, seconds: float) -> str | None:
        """The reason if a start of this duration is hung, else None; None until one start has finished."""
        usual = self._patience.usual(1)
        if usual is None or seconds <= self._patience.limit(1):
            return None
        return f"not ready {seconds:.0f} s after its process started; other starts took {usual:.0f} s"
