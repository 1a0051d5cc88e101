"""The actors of an evaluation: rollout actors and reward servers, no learner."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import ray

from g2rpo_ray.actors.system import System
from g2rpo_ray.actors.workers.encoder import Say
from g2rpo_ray.actors.workers.fetch import fetch_models
from g2rpo_ray.actors.workers.weights import PublishedWeights
from g2rpo_ray.analysis.video import strip
from g2rpo_ray.config import Config
from g2rpo_ray.models import manifest_of
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import Cell, FloatArray, Images, Metadata

Keep = Callable[[Cell, dict[str, FloatArray], Images | None], None]


class Evaluator(System):
    """Samples and scores with given weights; its learner is never started."""

    def __init__(self, config: Config, metadata: Mapping[str, Metadata], folder: Folder, group: asyncio.TaskGroup):
        super().__init__(config, metadata, folder, group)
        self._weights: dict[int, PublishedWeights] = {}

    async def start_evaluation(
        self, prompts: Sequence[str], states: Mapping[int, Mapping[str, FloatArray]], say: Say
    ) -> Literal[True]:
        """Fetch models, encode prompts, start the actors, and put the adapters' weights into the object store."""
        await fetch_models(self._config, say)
        await self._embeddings.encode(prompts, say)  # first: it may need the GPU of an actor
        self._start_pools()
        for version, state in states.items():
            self._weights[version] = PublishedWeights(manifest_of(state, version), ray.put(dict(state)))
        await self._ready()
        return True

    async def score(self, cells: Sequence[Cell], keep: Keep) -> Literal[True]:
        """Sample and score the cells; calls `keep` for each as soon as it is scored."""
        prompts = list(dict.fromkeys(cell.unit.prompt for cell in cells))
        embeddings = dict(zip(prompts, await self._embeddings.refs(prompts), strict=True))
        await asyncio.gather(*(self._score_one(cell, embeddings[cell.unit.prompt], keep) for cell in cells))
        self.take_spans()  # an evaluation draws no timeline
        return True

    async def _score_one(self, cell: Cell, embedding: ray.ObjectRef, keep: Keep) -> None:
        images, scores = await self.collector.sample(cell.unit, self._weights[cell.version], embedding)
        keep(cell, scores, strip((await images)[0]) if cell.shown else None)
