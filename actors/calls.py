"""Measures the CPU time of a call to an actor: of this process, of Ray's processes and of the actor's."""

import asyncio
import statistics
from typing import Any

import psutil
import ray

from g2rpo_ray.actors.cluster import cluster
from g2rpo_ray.actors.pool.actor import RayActor
from g2rpo_ray.actors.pool.device_faults import DeviceActor
from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.types import Images

BATCHES, PAIRS = 20, 10  # the result is the median of the batches: Ray starts processes during the first ones


@ray.remote(num_cpus=0)
class _Answering(DeviceActor):
    """Answers as rollout actors and reward servers do, without their work."""

    def __init__(self, result: Any, images: Images):
        self._result, self._images = result, images

    def _load(self) -> None:
        """It has no model."""

    @ray.method(num_returns=3)
    def compute(self) -> tuple[Any, Images, None]:
        return self._result, self._images.copy(), None

    def score(self, images: Images) -> int:
        return len(images)


def call_s(result: Any, images: Images) -> float:
    """CPU seconds of a call through a pool: the mean of a call that returns these and a call that takes the images.

    Starts a private Ray cluster for some seconds. On a cluster that exists its own processes are not counted.

    Raises:
        ValueError: Ray does not start on this machine.
    """
    with cluster(None):
        return asyncio.run(_measured(result, images))


async def _measured(result: Any, images: Images) -> float:
    def spawn(name: str) -> RayActor:
        return RayActor(_Answering.remote(result, images))  # type: ignore[attr-defined]

    taken = list[float]()
    async with asyncio.TaskGroup() as group:
        pool = Pool("calls", spawn, 1)
        pool.start(group)
        await pool.actors.wait_ready()
        for _ in range(BATCHES):
            before = _cpu_seconds()
            for _ in range(PAIRS):
                (_, made), _ = await pool.call("compute", priority=(0,))
                await pool.call("score", made, priority=(0,))
            taken.append((_cpu_seconds() - before) / (2 * PAIRS))
        pool.stop()
    return statistics.median(taken)


def _cpu_seconds() -> float:
    """CPU time of this process and of its children so far."""
    this, total = psutil.Process(), 0.0
    for process in [this, *this.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        total += used.user + used.system
    return total
