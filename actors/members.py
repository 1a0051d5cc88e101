"""The calls and the members of a pool: who serves, and who takes the next call."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ray.actor import ActorHandle

from g2rpo_ray.types import Place

AHEAD = 8  # calls that wait for each actor, above which it gets a second one


@dataclass(order=True, slots=True)
class Call:
    priority: tuple[float, ...]  # the smallest goes first
    order: int  # then the oldest
    method: str = field(compare=False)
    what: str = field(compare=False)  # for people
    args: tuple[Any, ...] = field(compare=False)
    done: asyncio.Future = field(compare=False)


@dataclass(slots=True)
class Member:
    name: str
    handle: ActorHandle
    place: Place | None = None  # once it is ready
    calls: list[Call] = field(default_factory=list)  # in flight
    since: float = 0.0  # when it began with the first of them
    retiring: bool = False
    failures: tuple[str, ...] = ()  # why those before it, each in place of the one before, did not start

    def __str__(self) -> str:
        return f"{self.name} on {self.place.address} (pid {self.place.pid})" if self.place else self.name


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
