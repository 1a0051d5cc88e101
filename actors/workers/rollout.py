"""The rollout actor: holds the frozen model and one version of the LoRA, and computes units."""

import time
from typing import TYPE_CHECKING, Any

import ray

from g2rpo_ray.actors.pool.device_faults import DeviceActor, with_memory
from g2rpo_ray.actors.workers.weights import PublishedWeights
from g2rpo_ray.config import Config
from g2rpo_ray.numerics import set_up_torch
from g2rpo_ray.runs.audit import digests
from g2rpo_ray.types import BranchUnit, Images, PromptEmbedding, Trunk, TrunkUnit, Unit, UnitReport

if TYPE_CHECKING:
    from g2rpo_ray.rollout.sampler import Units


@ray.remote
class RolloutActor(DeviceActor):
    """The Ray actor around `Sampler`. It computes a unit with the weights version of the call, or raises."""

    def __init__(self, name: str, config: Config, units: "Units" = "all"):
        self._name, self._config, self._units = name, config, units
        self._loaded: str | None = None  # checksum of the weights

    def _load(self) -> None:
        from g2rpo_ray.rollout.sampler import Sampler

        rollout = self._config.rollout
        threads = rollout.completions_threads if self._units == "completions" else rollout.threads
        set_up_torch(self._config.deterministic, threads)
        self._sampler = Sampler(self._config, units=self._units)

    @ray.method(num_returns=3)
    def compute(
        self, unit: Unit, weights: PublishedWeights, embedding: PromptEmbedding, trunk: Trunk | None = None
    ) -> tuple[Any, Images, UnitReport]:
        """The unit's result for the learner (None for a held-out sample), its images, and the report for the driver."""
        return with_memory(lambda: self._compute(unit, weights, embedding, trunk))

    def _compute(
        self, unit: Unit, weights: PublishedWeights, embedding: PromptEmbedding, trunk: Trunk | None
    ) -> tuple[Any, Images, UnitReport]:
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
            digests=digests(result, images),
            seconds=time.perf_counter() - fetched,
            fetch_seconds=fetched - start,
        )
        return result, images, report

    def _use(self, weights: PublishedWeights) -> None:
        if weights.manifest.checksum != self._loaded:
            self._loaded = None  # after a failed fetch there are no valid weights
            self._sampler.load_weights(weights.fetch())
            self._loaded = weights.manifest.checksum
