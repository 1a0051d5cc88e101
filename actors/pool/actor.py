"""The interface between pools and Ray: tests replace it by actors without Ray."""

import os
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from g2rpo_ray.types import Place


class Actor(Protocol):
    """A process that a pool calls: first `where` with the run's code version, then `ready`, which loads the model.

    Both return a `Place`.
    """

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method, after all earlier calls; an awaitable for each of its return values."""

    def end(self) -> None:
        """Kill the process; its running call fails with an error for which `is_death` is true."""


class RayActor:
    """An actor on Ray."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def call(self, method: str, *args: Any) -> list[Any]:
        refs = getattr(self._handle, method).remote(*args)
        return refs if isinstance(refs, list) else [refs]

    def end(self) -> None:
        ray.kill(self._handle)


def here() -> Place:
    """The place of this process: the result of an actor's `where`."""
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
