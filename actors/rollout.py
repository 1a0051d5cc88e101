"""The rollout actor: holds the frozen model and one version of the LoRA, computes work units."""

import time
from typing import Any

import ray

from actors.members import here
from actors.weights import PublishedWeights
from g2rpo_ray.config import Config
from g2rpo_ray.types import BranchUnit, Images, Place, PromptEmbedding, Trunk, TrunkUnit, Unit, UnitReport


@ray.remote
class RolloutActor:
    """A shell around `Sampler`; it computes with the weights version it is told to, or not at all."""

    def __init__(self, name: str, config: Config):
        import torch

        from g2rpo_ray.rollout.sampler import Sampler

        torch.set_num_threads(config.rollout.threads)
        self._name, self._place = name, here()
        self._sampler = Sampler(config)
        self._loaded: str | None = None  # checksum of the weights

    def ready(self) -> Place:
        """Where it is, once the model is loaded."""
        return self._place

    @ray.method(num_returns=3)
    def compute(
        self, unit: Unit, weights: PublishedWeights, embedding: PromptEmbedding, trunk: Trunk | None = None
    ) -> tuple[Any, Images, UnitReport]:
        """What the unit leaves for the learner (None for a sample), its images, and the report for the driver."""
        started, start = time.time(), time.perf_counter()
        self._use(weights)
        fetched = time.perf_counter()
        before = self._sampler.evaluations
        result: Any
        if isinstance(unit, TrunkUnit):
            result, images = self._sampler.trunk(unit, embedding)
        elif isinstance(unit, BranchUnit):
            assert trunk is not None
            result, images = self._sampler.branch(unit, embedding, trunk)
        else:
            result, images = None, self._sampler.sample(unit, embedding)
        report = UnitReport(
            unit=unit.name,
            actor=self._name,
            place=self._place,
            started=started,
            weights_version=weights.manifest.version,
            evaluations=self._sampler.evaluations - before,
            images=len(images),
            seconds=time.perf_counter() - fetched,
            fetch_seconds=fetched - start,
        )
        return result, images, report

    def _use(self, weights: PublishedWeights) -> None:
        if weights.manifest.checksum != self._loaded:
            self._loaded = None  # a failed fetch leaves no weights to work with
            self._sampler.load_weights(weights.fetch())
            self._loaded = weights.manifest.checksum
