"""Rollouts on their way to the learner: fetched to its node as they are made, so that they outlive who made them."""

import asyncio
import logging
import os
import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.failures import Hung, Patience, first_line, is_death, within

logger = logging.getLogger(__name__)

PAUSE_S = 1.0  # before a fetch: a call for each result is as much work for the driver as sending its unit


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)  # it has no state to lose
class _Fetcher:
    def pid(self) -> int:
        return os.getpid()

    def fetch(self, refs: "list[ray.ObjectRef[Any]]") -> list[Exception | None]:
        """Fetch objects to this node; for each the error that says that it is lost, or None."""
        try:
            ray.get(refs)
        except ray.exceptions.RayError:  # of one of them; ray.wait would wait for ever where an owner is gone
            return [_error(ref) for ref in refs]
        return [None] * len(refs)


def _error(ref: "ray.ObjectRef[Any]") -> Exception | None:
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return error
    return None


class Keeper:
    """Has the node of the learner fetch results. Those of a second go together, in one call."""

    def __init__(self, node: str, group: asyncio.TaskGroup, hung_after_s: float):
        """
        Args:
            node: Ray's id of it.
            group: learns of what goes wrong with the fetching itself.
            hung_after_s: seconds that fetching may take in any case.
        """
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        self._fetcher: Any = _Fetcher.options(scheduling_strategy=there).remote()  # type: ignore[attr-defined]
        self._group = group
        self._patience = Patience(hung_after_s)
        self._waiting: list[tuple[Any, asyncio.Future[None]]] = []
        self._fetching: asyncio.Task[None] | None = None
        self._at_once = asyncio.Event()

    async def keep(self, result: "ray.ObjectRef[Any]", at_once: bool = False) -> None:
        """Return when the node has the result; `at_once`: it and those before it have no others to wait for.

        Raises:
            RayError: the result was lost with its node, or its owner, before that.
        """
        kept = asyncio.get_running_loop().create_future()
        self._waiting.append((result, kept))
        if at_once:
            self._at_once.set()
        if self._fetching is None:
            self._fetching = self._group.create_task(self._fetch())
        await kept

    def stop(self) -> None:
        if self._fetching:
            self._fetching.cancel()
        ray.kill(self._fetcher)

    async def _fetch(self) -> None:
        while self._waiting:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._at_once.wait(), PAUSE_S)
            self._at_once.clear()
            batch, self._waiting = self._waiting, []
            errors = await self._fetched([result for result, _ in batch])
            for (_, kept), error in zip(batch, errors, strict=True):
                if not kept.done():
                    kept.set_exception(error) if error else kept.set_result(None)
        self._fetching = None

    async def _fetched(self, results: "list[ray.ObjectRef[Any]]") -> list[Exception | None]:
        """What is wrong with each of the results. A node that is gone says nothing: the next call to a rank does."""
        began = time.monotonic()
        try:
            errors = await within(self._patience.limit(len(results)), "fetching", self._fetcher.fetch.remote(results))
            self._patience.took(time.monotonic() - began, len(results))
            return errors
        except Hung as error:  # the process starts again; the update fetches what is not here
            logger.warning("the process that fetches results is taken for hung: %s", error)
            ray.kill(self._fetcher, no_restart=False)
        except ray.exceptions.RayError as error:
            if not is_death(error):
                raise
            logger.warning("the learner's node is gone, or about to go: %s", first_line(error))
        return [None] * len(results)
