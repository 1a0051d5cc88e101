"""Prefetches rollout results to the learner's node, so that they survive the loss of the nodes that made them."""

import asyncio
import logging
import os
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from g2rpo_ray.actors.pool.failures import first_line, is_lost_object
from g2rpo_ray.actors.pool.limits import Hung, Patience, within
from g2rpo_ray.actors.pool.order import PREFETCH_S

logger = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)  # it has no state
class _Fetcher:
    def pid(self) -> int:
        return os.getpid()

    def fetch(self, results: "list[ray.ObjectRef[Any]]") -> None:
        ray.get(results)  # ray.wait would block for ever if an owner is lost


class Keeper:
    """Prefetches results by an actor on the learner's node."""

    def __init__(self, node: str, hung_after_s: float):
        """
        Args:
            node: Ray's id of the learner's node.
            hung_after_s: time limit of a fetch, seconds, while its usual duration is unknown.
        """
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        self._fetcher: Any = _Fetcher.options(scheduling_strategy=there).remote()  # type: ignore[attr-defined]
        self._patience = Patience(hung_after_s)
        self._waiting: list[ray.ObjectRef[Any]] = []
        self._call: asyncio.Future[None]

    async def keep(self, result: "ray.ObjectRef[Any]") -> None:
        """Wait until the node has the result. If it cannot be prefetched, the update fetches it.

        Raises:
            RayError: the result was lost with its node or its owner.
        """
        if not self._waiting:
            self._call = asyncio.ensure_future(self._fetch_waiting())
        self._waiting.append(result)
        try:
            await asyncio.shield(self._call)
        except ray.exceptions.RayError:  # of another one in the same batch, perhaps
            await self._fetch([result])

    async def _fetch_waiting(self) -> None:
        await asyncio.sleep(PREFETCH_S)
        results, self._waiting = self._waiting, []
        await self._fetch(results)

    async def _fetch(self, results: "list[ray.ObjectRef[Any]]") -> None:
        began = time.monotonic()
        try:
            await within(self._patience.limit(len(results)), "fetching", self._fetcher.fetch.remote(results))
            self._patience.took(time.monotonic() - began, len(results))
        except (Hung, ray.exceptions.RayError) as error:
            if is_lost_object(error):
                raise
            logger.warning("results could not be prefetched to the learner's node: %s", first_line(error))
            if isinstance(error, Hung):
                ray.kill(self._fetcher, no_restart=False)

    def stop(self) -> None:
        ray.kill(self._fetcher)
