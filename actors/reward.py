"""Reward servers: an actor for each replica of each reward model, and the scorer that spreads images over them."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import ray

from actors.crew import Counter
from actors.failures import Hung, is_lost_object
from actors.members import here
from actors.pool import Pool
from g2rpo_ray.config import RewardConfig
from g2rpo_ray.rewards import NotScores, ask, build_reward
from g2rpo_ray.types import FloatArray, Images, Metadata, Place, Span
from g2rpo_ray.words import one_line

logger = logging.getLogger(__name__)


@ray.remote
class RewardActor:
    """A shell around one reward model."""

    def __init__(self, name: str, config: RewardConfig):
        import torch

        torch.set_num_threads(config.threads)
        self._name, self._place = name, here()
        self._batch_size = config.batch_size
        self._reward = build_reward(config.kind, **config.options)

    def ready(self) -> Place:
        """Where it is, once the model is loaded."""
        return self._place

    def score(self, images: Images, prompt: str, metadata: Metadata) -> tuple[FloatArray, Span]:
        """Scores [N] of images [N, H, W, 3] of one unit, NaN where one is missing; and when that was.

        A forward pass holds images of this unit alone, in chunks of a fixed size: the last bits of a matrix product
        depend on its batch, and a score must not depend on what else was waiting.
        """
        started, start = time.time(), time.perf_counter()
        chunks = [images[at : at + self._batch_size] for at in range(0, len(images), self._batch_size)]
        scores = [ask(self._reward, chunk, [prompt] * len(chunk), [metadata] * len(chunk)) for chunk in chunks]
        span = Span(self._name, self._place.address, "score", started, time.perf_counter() - start)
        return np.concatenate(scores), span


class Scorer:
    """One reward: its servers, the retries, and the count of what stayed missing."""

    def __init__(
        self, name: str, config: RewardConfig, pool: Pool, timeline: list[Span], metadata: Mapping[str, Metadata]
    ):
        self.name = name
        self.pool = pool
        self.missing = Counter()
        self._timeline, self._metadata = timeline, metadata
        self._retries = config.retries

    async def score(self, images: ray.ObjectRef, count: int, prompt: str, what: str = "") -> FloatArray:
        """Scores [count]; what failed or is not finite is asked for again, and NaN if it stays so: missing, never 0."""
        scores, known = np.full(count, np.nan, dtype=np.float32), self._metadata.get(prompt, {})
        for _ in range(1 + self._retries):
            reason = "not a finite number"
            try:
                _, (answer, span) = await self.pool.call(
                    "score", images, prompt, known, priority=(0,), what=f"score of {what}", cost=count
                )
                self._timeline.append(replace(span, what=what))
                scores = np.where(np.isfinite(scores), scores, answer)
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


def _missing(scores: FloatArray) -> int:
    return int((~np.isfinite(scores)).sum())
