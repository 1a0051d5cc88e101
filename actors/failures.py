"""What Ray's errors mean here: who died, what was lost; and what takes so long that it is taken for hung."""

import asyncio
import re
import statistics
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from g2rpo_ray.words import one_line

T = TypeVar("T")

# An actor killed for memory, whose node left in good order, or whose environment can't be made, is no RayActorError.
DEATHS = (
    *(RayActorError, ActorUnschedulableError, OutOfMemoryError, NodeDiedError, WorkerCrashedError),
    RuntimeEnvSetupError,
)

FLOOR_S = 60.0  # below this nothing is taken for hung because of its peers
TIMES = 10.0  # as long as its peers take
KEPT = 50  # calls that the estimate is made from
ENDING_S = 20.0  # for what is under way when somebody asks to end; longer only where it usually takes longer


class Hung(RuntimeError):
    """Something did not come back in time."""


def is_lost_object(error: BaseException) -> bool:
    """Whether an error says that an object went with the node that held it; what made it can make it again."""
    return isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError)


def is_death(error: BaseException) -> bool:
    """Whether an error says that the process which was called is gone."""
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)  # of a call that failed for such a reason


def exit_reason(error: BaseException) -> str:
    """Why an actor died: what its constructor raised, or how its process ended; one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RuntimeEnvSetupError):
        return f"its runtime_env can't be made: {one_line(next(filter(_says_why, reversed(lines)), lines[-1]), 400)}"
    if getattr(error, "actor_init_failed", False):
        return one_line(lines[-1])
    why = next((line for line in lines if "Worker exit detail: " in line), first_line(error))
    return one_line(why.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0])


def _says_why(line: str) -> bool:
    """Whether a line of a runtime environment's failure is an exception or an installer's error."""
    return bool(re.match(r"(\w+\.)*\w*(Error|Exception): |ERROR: |error: |× ", line))


def first_line(error: BaseException) -> str:
    """Of an error's message; of what a call raised, the last: the first ones say where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if isinstance(error, RayTaskError) else 0] if lines else type(error).__name__


def in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """What `work` returns. Unlike asyncio's own threads, this one may block for ever: nothing waits for its end."""
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
        Hung: there is none after `limit_s` seconds.
    """
    try:
        return await asyncio.wait_for(work, limit_s)
    except TimeoutError:
        raise Hung(f"{what}: no answer after {limit_s:.0f} s") from None


class Patience:
    """How long a call of a kind may take: a set time, and, once peers are known, many times what they took.

    A cost is what the time of a call grows with: evaluations, images, states.
    """

    def __init__(self, limit_s: float, floor_s: float | None = None):
        self._limit_s, self._floor_s = limit_s, floor_s
        self._paces: deque[float] = deque(maxlen=KEPT)

    def took(self, seconds: float, cost: float) -> None:
        self._paces.append(seconds / max(cost, 1))

    def usual(self, cost: float) -> float | None:
        """Seconds that such a call takes; None if that is not known yet."""
        return statistics.median(self._paces) * max(cost, 1) if self._paces else None

    def limit(self, cost: float) -> float:
        """Seconds after which such a call is taken for hung."""
        usual, floor = self.usual(cost), FLOOR_S if self._floor_s is None else self._floor_s
        return self._limit_s if usual is None else min(self._limit_s, max(floor, TIMES * usual))

    def ending(self, cost: float) -> float:
        """Seconds that such a call gets once somebody asked to end."""
        return min(self.limit(cost), max(ENDING_S, 3 * (self.usual(cost) or 0)))
