"""What works for an evaluation on the cluster: rollout actors and reward servers, no learner."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import ray

from actors.encoder import Say
from actors.system import System
from actors.weights import PublishedWeights
from g2rpo_ray.comparison.scorebook import Cell
from g2rpo_ray.config import Config
from g2rpo_ray.models import describe
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import FloatArray, Images, Metadata

Keep = Callable[[Cell, dict[str, FloatArray], Images | None], None]


class Evaluator(System):
    """A system that samples and scores with weights that are there already: its learner is never started."""

    def __init__(self, config: Config, metadata: Mapping[str, Metadata], folder: Folder, group: asyncio.TaskGroup):
        super().__init__(config, metadata, folder, group)
        self._weights: dict[int, PublishedWeights] = {}

    async def start_evaluation(
        self, prompts: Sequence[str], states: Mapping[int, Mapping[str, FloatArray]], say: Say
    ) -> Literal[True]:
        """Encode the prompts, start the actors, put the adapters' weights into the object store, by version."""
        await self._embeddings.encode(prompts, say)  # first: it may need the GPU of an actor
        self._start_pools()
        for version, state in states.items():
            self._weights[version] = PublishedWeights(describe(state, version), ray.put(dict(state)))
        await self._ready()
        return True

    async def score(self, cells: Sequence[Cell], keep: Keep) -> Literal[True]:
        """Sample and score the cells; each is handed to `keep` as soon as it is done."""
        prompts = list(dict.fromkeys(cell.unit.prompt for cell in cells))
        embeddings = dict(zip(prompts, await self._embeddings.refs(prompts), strict=True))
        await asyncio.gather(*(self._score_one(cell, embeddings[cell.unit.prompt], keep) for cell in cells))
        self.take_spans()  # an evaluation draws no timeline
        return True

    async def _score_one(self, cell: Cell, embedding: ray.ObjectRef, keep: Keep) -> None:
        images, scores = await self.collector.sample(cell.unit, self._weights[cell.version], embedding)
        keep(cell, scores, (await images)[0] if cell.shown else None)
