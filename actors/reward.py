"""Reward servers: an actor for each replica of each reward model, and the scorer that spreads images over them."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import ray

from actors.crew import Counter
from actors.failures import Hung, is_lost_object
from actors.members import here
from actors.pool import Pool
from g2rpo_ray.config import Config, RewardConfig, ray_options
from g2rpo_ray.rewards import NotScores, ask_parts, build_reward, serving
from g2rpo_ray.types import FloatArray, Images, Metadata, Place, Span
from g2rpo_ray.words import one_line

logger = logging.getLogger(__name__)

Picks = Sequence[tuple[int, int]]
"""Of several units: (place of the unit, place of the image in it), an image each."""
Asked = WeakValueDictionary[Any, asyncio.Future[dict[str, FloatArray]]]


@ray.remote
class RewardActor:
    """A shell around one reward model."""

    def __init__(self, name: str, config: RewardConfig):
        import torch

        torch.set_num_threads(config.threads)
        self._name, self._batch_size = name, config.batch_size
        self._reward = build_reward(config.kind, **config.options)
        self._place = replace(here(), takes_groups=getattr(self._reward, "scope", "image") == "group")

    def ready(self) -> Place:
        """Where it is, and what it takes, once the model is loaded."""
        return self._place

    def score(
        self, prompt: str, metadata: Metadata, picks: Picks | None, *units: Images
    ) -> tuple[dict[str, FloatArray], Span]:
        """Scores [N] by part, NaN where one is missing, of the images [N, H, W, 3] of one unit, or those that `picks`
        says of several; and when that was.

        A forward pass holds these images alone, in chunks of a fixed size: the last bits of a matrix product
        depend on its batch, and a score must not depend on what else was waiting.
        """
        started, start = time.time(), time.perf_counter()
        images = units[0] if picks is None else np.stack([units[unit][row] for unit, row in picks])
        size = len(images) if self._place.takes_groups else self._batch_size
        chunks = [images[at : at + size] for at in range(0, len(images), size)]
        found = [ask_parts(self._reward, chunk, [prompt] * len(chunk), [metadata] * len(chunk)) for chunk in chunks]
        span = Span(self._name, self._place.address, "score", started, time.perf_counter() - start)
        return {part: np.concatenate([scores[part] for scores in found]) for part in found[0]}, span


class Scorer:
    """One reward: its servers, the retries, and the count of what stayed missing."""

    def __init__(
        self,
        name: str,
        config: RewardConfig,
        pool: Pool,
        timeline: list[Span],
        metadata: Mapping[str, Metadata],
        asked: Asked | None = None,
    ):
        """`asked`: what is under way, where rewards that are parts of one answer share a pool."""
        self.name = name
        self.pool = pool
        self.missing = Counter()
        self.takes_groups = False
        """All images at once that credit compares: known once a server is ready."""
        self._timeline, self._metadata = timeline, metadata
        self._retries = config.retries
        self._part = config.options.get("part", "")
        self._asked: Asked = WeakValueDictionary() if asked is None else asked

    async def wait_ready(self) -> None:
        """Return as soon as a server can score."""
        await self.pool.wait_ready()
        self.takes_groups = any(place.takes_groups for place in self.pool.places)

    async def score(
        self, units: Sequence[ray.ObjectRef], count: int, prompt: str, what: str = "", picks: Picks | None = None
    ) -> FloatArray:
        """Scores [count] of a unit's images, or those picked from several; what failed or is not finite is asked for
        again, and NaN if it stays so: missing, never 0.
        """
        scores = np.full(count, np.nan, dtype=np.float32)
        for attempt in range(1 + self._retries):
            reason = "not a finite number"
            try:
                answer = await self._ask(attempt, units, count, prompt, what, picks)
                found = answer[""] if "" in answer else answer[self._part]
                scores = np.where(np.isfinite(scores), scores, found)
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
        """The scores by part: asked for once, whichever of the rewards that share the pool asks first."""
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
        _, (answer, span) = await self.pool.call(
            "score", prompt, known, picks, *units, priority=(0,), what=f"score of {what}", cost=count
        )
        self._timeline.append(replace(span, what=what))
        found: dict[str, FloatArray] = answer
        return found


def _missing(scores: FloatArray) -> int:
    return int((~np.isfinite(scores)).sum())


def make_scorers(config: Config, timeline: list[Span], metadata: Mapping[str, Metadata]) -> dict[str, Scorer]:
    """A scorer for each reward; those that are parts of one answer share their servers and each request."""
    scorers: dict[str, Scorer] = {}
    asked: dict[str, Asked] = {}
    for name, first in serving(config.all_rewards).items():
        reward = config.all_rewards[name]
        pool = _pool(name, reward, config) if first == name else scorers[first].pool
        shared = asked.setdefault(first, WeakValueDictionary())
        scorers[name] = Scorer(name, reward, pool, timeline, metadata, shared)
    return scorers


def _pool(name: str, reward: RewardConfig, config: Config) -> Pool:
    environment = {"runtime_env": reward.runtime_env} if reward.runtime_env else {}
    actor = RewardActor.options(**ray_options(reward.resources), **environment)  # type: ignore[attr-defined]
    return Pool(
        f"reward {name}",
        lambda actor_name: actor.remote(actor_name, reward),
        reward.replicas,
        max_restarts=reward.max_restarts,
        patience_s=config.startup_timeout_s,
        hung_after_s=config.hung_after_s,
        resources=reward.resources,
    )
