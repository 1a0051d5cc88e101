"""The calls and the members of a pool: who serves, who takes the next call, who is late with one."""

import asyncio
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.starts import Start
from g2rpo_ray.types import Place

AHEAD = 8  # calls that wait for each actor, above which it gets a second one
WORTH = 2.0  # as long as a copy of a call would take: what the call must still need where it is


def here() -> Place:
    """The place of the process that asks: what an actor's `ready` returns."""
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())


@dataclass(order=True, slots=True)
class Call:
    priority: tuple[float, ...]  # the smallest goes first
    order: int  # then the oldest
    method: str = field(compare=False)
    what: str = field(compare=False)  # for people
    args: tuple[Any, ...] = field(compare=False)
    cost: float = field(compare=False)  # what its time grows with
    done: asyncio.Future = field(compare=False)
    holders: int = field(default=0, compare=False)  # actors that are at it
    hung: int = field(default=0, compare=False)  # actors that were taken for hung over it


@dataclass(slots=True)
class Member:
    name: str
    handle: ActorHandle
    start: Start
    place: Place | None = None  # once it is ready
    calls: list[Call] = field(default_factory=list)  # in flight
    since: float = 0.0  # when it began with the first of them
    pace: float | None = None  # seconds per unit of cost, lately; None before its first answer
    told: bool = False  # that it is late with the first of them
    retiring: bool = False

    def __str__(self) -> str:
        return f"{self.name} on {self.place.address} (pid {self.place.pid})" if self.place else self.name

    def begin(self) -> None:
        """The first of its calls begins now."""
        self.since, self.told = time.monotonic(), False

    def took(self, seconds: float, cost: float) -> None:
        pace = seconds / max(cost, 1)
        self.pace = pace if self.pace is None else (self.pace + pace) / 2

    def left(self, call: Call, pace: float) -> float:
        """Seconds until it has done a call in hand; infinity where the first one took twice what it should have."""
        pace, spent = self.pace or pace, time.monotonic() - self.since
        if spent > 2 * pace * self.calls[0].cost:
            return math.inf
        costs = [other.cost for other in self.calls[: self.calls.index(call) + 1]]
        return max(0.0, pace * sum(costs) - spent)


class Members:
    """The actors of a pool. They are kept by the number of calls in hand, too: dispatch must not look at each."""

    def __init__(self) -> None:
        self._all: dict[str, Member] = {}
        self._by_load: tuple[dict[str, Member], ...] = ({}, {}, {})  # who serves, with 0, 1, 2 calls in hand

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._all.values()))

    def __contains__(self, member: Member) -> bool:
        return member.name in self._all

    def add(self, member: Member) -> None:
        self._all[member.name] = member

    def remove(self, member: Member) -> bool:
        """Whether it was there."""
        there = self._all.pop(member.name, None) is not None
        self.shelve(member)
        return there

    def shelve(self, member: Member) -> None:
        """Take note of what a member has in hand, or that it serves no more."""
        for serving in self._by_load:
            serving.pop(member.name, None)
        if member in self and member.place and not member.retiring:
            self._by_load[len(member.calls)][member.name] = member

    def next(self, waiting: int) -> Member | None:
        """Who takes the next of the waiting calls: one that is idle, or has one call in hand while many wait."""
        idle, busy, _ = self._by_load
        serving = sum(map(len, self._by_load))
        takers = idle if idle and waiting else busy if waiting > AHEAD * serving else {}
        return next(iter(takers.values()), None)

    def copy(self, pace: float) -> tuple[Member, Call] | None:
        """An idle actor, and a call in another's hand that it would be done with much earlier.

        `pace`: seconds per unit of cost of an actor that has not answered yet.
        """
        idle, *busy = self._by_load
        if not idle:
            return None
        taker = min(idle.values(), key=lambda member: member.pace or pace)
        late = [
            (holder.left(call, pace) - WORTH * (taker.pace or pace) * call.cost, call)
            for holders in busy
            for holder in holders.values()
            for call in holder.calls
            if call.holders == 1 and not call.done.done()
        ]
        gain, call = max(late, key=lambda found: found[0], default=(0.0, None))
        return (taker, call) if call and gain > 0 else None
