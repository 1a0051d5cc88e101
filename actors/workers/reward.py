"""Reward servers: one actor for each replica of a reward model, and the scorer that sends images to them."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import ray

from g2rpo_ray.actors.pool.actor import RayActor
from g2rpo_ray.actors.pool.device_faults import DeviceActor, with_memory
from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.actors.pool.failures import is_lost_object
from g2rpo_ray.actors.pool.limits import Hung
from g2rpo_ray.actors.pool.supervision import Counter
from g2rpo_ray.config import Config, RewardConfig, ray_options
from g2rpo_ray.data.pictures import has_pictures, with_content
from g2rpo_ray.messages import one_line
from g2rpo_ray.numerics import set_up_torch
from g2rpo_ray.rewards import NotScores, ask_in_chunks, max_duration_s, open_reward, scores_of, serving
from g2rpo_ray.types import FloatArray, Images, Metadata, Span

logger = logging.getLogger(__name__)

Picks = Sequence[tuple[int, int]]
"""(index of the unit, index of the image in it) of each image, over several units."""
MAX_STORED_PICTURES = 128  # prompts whose pictures stay in the object store
Asked = WeakValueDictionary[Any, asyncio.Future[dict[str, FloatArray]]]


@ray.remote
class RewardActor(DeviceActor):
    """The Ray actor of one reward model."""

    def __init__(self, name: str, config: RewardConfig, deterministic: bool = True):
        self._name, self._config, self._deterministic = name, config, deterministic

    def _load(self) -> None:
        set_up_torch(self._deterministic, self._config.threads)
        self._reward = open_reward(self._config)
        takes_groups = getattr(self._reward, "scope", "image") == "group"
        self._place = replace(self._place, takes_groups=takes_groups, waits=getattr(self._reward, "waits", (0.0, 1)))

    def score(
        self, prompt: str, metadata: Metadata, picks: Picks | None, *units: Images
    ) -> tuple[dict[str, FloatArray], Span]:
        """Scores [N] by part, NaN where missing, and the time span.

        Args:
            picks: the images to score, of several units; None: all images [N, H, W, 3] of one unit.
        """
        started, start = time.time(), time.perf_counter()
        images = units[0] if picks is None else np.stack([units[unit][row] for unit, row in picks])
        size, frames = len(images) if self._place.takes_groups else self._config.batch_size, self._config.frames
        found = with_memory(lambda: ask_in_chunks(self._reward, images, prompt, metadata, size, frames))
        return found, Span(self._name, self._place.address, "score", started, time.perf_counter() - start)


class Scorer:
    """One reward: calls its servers, retries failed scores, counts those that remain missing."""

    def __init__(
        self,
        name: str,
        config: RewardConfig,
        pool: Pool,
        timeline: list[Span],
        metadata: Mapping[str, Metadata],
        asked: Asked | None = None,
        pictures: Callable[[str], ray.ObjectRef] | None = None,
    ):
        """
        Args:
            asked: running requests, which rewards that are parts of one answer share.
            pictures: see `stored_pictures`; rewards share it.
        """
        self.name = name
        self.pool = pool
        self.missing = Counter()
        self.takes_groups = False
        """Whether it scores whole groups of images; known once a server is ready."""
        self._waits = (0.0, 1)  # known once a server is ready
        self._timeline, self._metadata = timeline, metadata
        self._pictures = pictures or stored_pictures(metadata)
        self._config = config
        self._asked: Asked = WeakValueDictionary() if asked is None else asked

    async def wait_ready(self) -> None:
        """Wait until a server is ready."""
        await self.pool.actors.wait_ready()
        places = self.pool.actors.places.values()
        self.takes_groups = any(place.takes_groups for place in places)
        self._waits = max(place.waits for place in places)

    async def score(
        self, units: Sequence[ray.ObjectRef], count: int, prompt: str, what: str = "", picks: Picks | None = None
    ) -> FloatArray:
        """Scores [count] of a unit's images, or of those picked from several units.

        Scores that fail or are not finite are retried `retries` times. Then they are NaN: missing, never 0.
        """
        scores = np.full(count, np.nan, dtype=np.float32)
        for attempt in range(1 + self._config.retries):
            reason = "not a finite number"
            try:
                answer = await self._ask(attempt, units, count, prompt, what, picks)
                scores = np.where(np.isfinite(scores), scores, scores_of(self._config, answer))
            except ray.exceptions.RayTaskError as error:
                if is_lost_object(error):
                    raise
                if isinstance(error.cause, NotScores):
                    raise NotScores(f"reward {self.name}: {error.cause}") from None
                reason = one_line(repr(error.cause))
            except Hung as error:
                reason = str(error)
            if np.isfinite(scores).all():
                return scores
            logger.warning(
                "reward %s: %d scores missing for %s, %r: %s", self.name, _missing(scores), what, prompt, reason
            )
        self.missing.add(_missing(scores))
        return np.where(np.isfinite(scores), scores, np.float32(np.nan))

    async def _ask(
        self, attempt: int, units: Sequence[ray.ObjectRef], count: int, prompt: str, what: str, picks: Picks | None
    ) -> dict[str, FloatArray]:
        """The scores by part; rewards that share a pool share the request."""
        key = (attempt, tuple(units), what)
        task = self._asked.get(key)
        if task is None:
            call = self._call(prompt, picks, units, what, count)
            task = self._asked[key] = asyncio.ensure_future(call)
        return await task

    async def _call(
        self, prompt: str, picks: Picks | None, units: Sequence[ray.ObjectRef], what: str, count: int
    ) -> dict[str, FloatArray]:
        known = self._metadata.get(prompt, {})
        min_timeout_s = max_duration_s(self._config, count, known, self._waits, self.takes_groups)
        told = await asyncio.to_thread(self._pictures, prompt) if has_pictures(known) else known
        work = (prompt, told, picks, *units)
        _, (answer, span) = await self.pool.call(
            "score", *work, priority=(0,), what=f"score of {what}", cost=count, min_timeout_s=min_timeout_s
        )
        self._timeline.append(replace(span, what=what))
        found: dict[str, FloatArray] = answer
        return found


def _missing(scores: FloatArray) -> int:
    return int((~np.isfinite(scores)).sum())


def stored_pictures(metadata: Mapping[str, Metadata]) -> Callable[[str], ray.ObjectRef]:
    """The metadata of a prompt that has pictures, with their bytes, in the object store: put there once for many
    images."""
    return lru_cache(MAX_STORED_PICTURES)(lambda prompt: ray.put(with_content(metadata[prompt])))


def make_scorers(config: Config, timeline: list[Span], metadata: Mapping[str, Metadata]) -> dict[str, Scorer]:
    """A scorer for each reward; rewards that are parts of one answer share servers and requests."""
    scorers: dict[str, Scorer] = {}
    asked: dict[str, Asked] = {}
    pictures = stored_pictures(metadata)
    for name, first in serving(config.all_rewards).items():
        reward = config.all_rewards[name]
        pool = _pool(name, reward, config) if first == name else scorers[first].pool
        shared = asked.setdefault(first, WeakValueDictionary())
        scorers[name] = Scorer(name, reward, pool, timeline, metadata, shared, pictures)
    return scorers


def _pool(name: str, reward: RewardConfig, config: Config) -> Pool:
    actor = RewardActor.options(**ray_options(reward.resources, reward.runtime_env))  # type: ignore[attr-defined]
    return Pool(
        f"reward {name}",
        lambda actor_name: RayActor(actor.remote(actor_name, reward, config.deterministic)),
        reward.replicas,
        max_restarts=reward.max_restarts,
        patience_s=config.startup_timeout_s,
        hung_after_s=config.hung_after_s,
        resources=reward.resources,
    )
