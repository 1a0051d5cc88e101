"""Measures what Ray and shared cores cost: the CPU time of a call to an actor, and an actor's work beside others."""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import psutil
import ray

from g2rpo_ray.actors.cluster import cluster
from g2rpo_ray.actors.pool.actor import RayActor
from g2rpo_ray.actors.pool.device_faults import DeviceActor
from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.types import Images

BATCHES, PAIRS = 10, 50  # the result is the median of the batches: Ray starts processes during the first ones
MOST_S = 4.0  # for which actors work beside each other
LIMIT_S = 600.0  # until they have loaded a model and worked

Work = Callable[[], Callable[[], Any]]
"""Loads what the work needs and returns the work; it travels to the actors."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What `measure` found; of calls only, if there was no actor to work."""

    call: float  # CPU seconds of a call: the mean of one that returns a unit's result and one that takes its images
    alone: float = 0.0  # CPU seconds of the work in an actor while the others wait
    beside: float = 0.0  # CPU seconds of the work in actors that work at the same time
    ray: float = 0.0  # number of cores that Ray's own processes keep busy


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


@ray.remote(num_cpus=0)
class _Working:
    """Does the work of a rollout actor, and measures it."""

    def __init__(self, work: Work):
        self._work = work()
        self._work()

    def ready(self) -> None:
        """Returns when the model is loaded."""

    def cpu_s(self, seconds: float) -> list[float]:
        """CPU seconds of each repetition of the work in that time, at least of one."""
        taken, end = list[float](), time.monotonic() + seconds
        while not taken or time.monotonic() < end:
            before = time.process_time()
            self._work()
            taken.append(time.process_time() - before)
        return taken


def measure(result: Any, images: Images, work: Work, actors: int, limit_s: float) -> Shared:
    """Measure calls with these results of a unit, and `work` in so many actors at once; 0 actors: not the work.

    `limit_s` limits the time of the work, in which it is done at least once.

    Starts a private Ray cluster. On a cluster that exists its own processes are not counted.

    Raises:
        ValueError: Ray does not start on this machine, or the actors do not end in time.
    """
    with cluster(None):
        call = asyncio.run(_calls(result, images))
        return Shared(call, *_work(work, actors, min(limit_s, MOST_S))) if actors else Shared(call)


def _work(work: Work, actors: int, seconds: float) -> tuple[float, float, float]:
    """`alone`, `beside` and `ray` of `Shared`."""
    working = [_Working.remote(work) for _ in range(actors)]  # type: ignore[attr-defined]
    try:
        ray.get([actor.ready.remote() for actor in working], timeout=LIMIT_S)
        alone = ray.get(working[0].cpu_s.remote(seconds), timeout=LIMIT_S)
        before, began = _cpu_seconds(), time.monotonic()
        beside = ray.get([actor.cpu_s.remote(seconds) for actor in working], timeout=LIMIT_S)
        others = _cpu_seconds() - before - sum(map(sum, beside))
        busy = max(0.0, others / (time.monotonic() - began))
        return statistics.median(alone), statistics.median(chain(*beside)), busy
    except ray.exceptions.GetTimeoutError:
        raise ValueError(f"{actors} actors that share the cores do not end within {LIMIT_S:g} s") from None
    finally:
        for actor in working:
            ray.kill(actor)


async def _calls(result: Any, images: Images) -> float:
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
