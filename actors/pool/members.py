"""The records of a pool: a call, and a member, which is an actor with its running call."""

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any

from g2rpo_ray.actors.pool.actor import Actor
from g2rpo_ray.actors.pool.limits import now
from g2rpo_ray.types import Place


@dataclass(order=True, slots=True)
class Call:
    priority: tuple[float, ...]  # the smallest goes first
    order: int  # then the oldest
    method: str = field(compare=False)
    what: str = field(compare=False)  # its name in the log
    args: tuple[Any, ...] = field(compare=False)
    cost: float = field(compare=False)  # what its time grows with
    min_timeout_s: float = field(compare=False)  # lower bound of its time limit
    done: asyncio.Future = field(compare=False)
    holders: int = field(default=0, compare=False)  # actors that run it
    hung: int = field(default=0, compare=False)  # actors that hung on it
    faults: int = field(default=0, compare=False)  # actors whose device failed on it


@dataclass(slots=True, eq=False)
class Member:
    """An actor of a pool. The supervisor starts and ends it; the pool assigns its calls."""

    name: str
    actor: Actor
    place: Place | None = None  # once it has a process
    ready: bool = False
    call: Call | None = None
    since: float = 0.0  # start of its call, or of its process before the first call
    pace: float | None = None  # recent seconds per unit of cost; None before its first result
    warned: bool = False  # its running call was reported as late
    retiring: bool = False  # ends after its running call
    ended: bool = False

    @property
    def node(self) -> str | None:
        """Ray's node id; None while it has no process."""
        return self.place.node if self.place else None

    def __str__(self) -> str:
        return f"{self.name} on {self.place.address} (pid {self.place.pid})" if self.place else self.name

    def took(self, seconds: float, cost: float) -> None:
        pace = seconds / max(cost, 1)
        self.pace = pace if self.pace is None else (self.pace + pace) / 2

    def left_s(self, call: Call, pace: float) -> float:
        """Estimated seconds until its call finishes; infinite once the call has taken twice the estimate.

        `pace`: seconds per unit of cost to assume for an actor without a result.
        """
        expected, spent = (self.pace or pace) * call.cost, now() - self.since
        return math.inf if spent > 2 * expected else max(0.0, expected - spent)
