"""Starts that stand still: how long actors have been starting since they have a process, and how long that takes."""

import time
from collections.abc import Sequence
from contextlib import suppress

from ray._private import state  # as for drains: there is no public way that does without the dashboard
from ray.actor import ActorHandle

from actors.failures import Hung, Patience, in_thread, within

LOOK_EVERY_S = 5.0  # one question to the head for each actor that is starting


class Start:
    """The start of an actor, or of several that wait for each other.

    It begins when all have a process: until then they wait for resources, which may take as long as a new machine does.
    """

    def __init__(self, actors: Sequence[ActorHandle]):
        self._actors = actors
        self._began: float | None = None

    async def look(self) -> None:
        """Find out whether it has begun."""
        with suppress(Hung):  # a head that is gone is seen elsewhere
            if self._began is None and await within(LOOK_EVERY_S, "the head", in_thread(self._has_begun)):
                self._began = time.monotonic()

    def _has_begun(self) -> bool:
        try:
            return all(state.actors(actor._actor_id.hex()).get("Pid") for actor in self._actors)
        except Exception:  # the head restarts
            return False

    @property
    def seconds(self) -> float:
        """Since it was seen to have begun."""
        return 0.0 if self._began is None else time.monotonic() - self._began


class Starts:
    """What starts of a kind take, and which of them takes so much longer that it is taken for hung."""

    def __init__(self, limit_s: float):
        """`limit_s`: how long actors may be waited for at all; half of it is anyone's: a cold disk is no hang."""
        self._patience = Patience(limit_s, limit_s / 2)

    def took(self, start: Start) -> None:
        """It is over."""
        self._patience.took(max(start.seconds, LOOK_EVERY_S), 1)

    def hung(self, start: Start) -> str | None:
        """Why it is taken for hung, if it is: none is before the first one of all is over."""
        usual = self._patience.usual(1)
        if usual is None or start.seconds <= self._patience.limit(1):
            return None
        return f"not ready {start.seconds:.0f} s after its process was there; others took {usual:.0f} s"
