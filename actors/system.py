"""All that works for a run on the cluster: started together, watched together, ended together."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from ray.actor import ActorHandle

from actors.collector import Collector
from actors.encoder import Embeddings
from actors.pool import Pool, Spawn
from actors.reward import RewardActor, Scorer
from actors.rollout import RolloutActor
from actors.weights import PublishedWeights
from g2rpo_ray.checkpoint import Checkpoint
from g2rpo_ray.config import Config, RewardConfig, ray_options
from learner.group import LearnerGroup


class System:
    """The stations of an iteration, and the pools that keep them staffed."""

    def __init__(self, config: Config, run: Path, checkpoint: Checkpoint | None, group: asyncio.TaskGroup):
        self._config = config
        self._group = group
        self._embeddings = Embeddings(config, config.data.embeddings or str((run / "embeddings").resolve()))
        credits = asyncio.Semaphore(max(config.rollout.max_unscored_units, 2 * config.rollout.actors))
        self._rollout = Pool(
            "rollout", _rollout_spawn(config), config.rollout.actors, config.rollout.max_restarts, credits
        )
        self._scorers = {name: _scorer(name, reward) for name, reward in config.all_rewards.items()}
        self._pools = [self._rollout, *(scorer.pool for scorer in self._scorers.values())]
        self.learner = LearnerGroup(config, checkpoint.path if checkpoint else None)
        self.collector = Collector(config, self._embeddings, self._rollout, self._scorers, credits)

    async def start(self, prompts: Sequence[str]) -> Literal[True]:
        """Encode the prompts, then start all actors; returns when the learner and one actor of each kind can work."""
        await self._embeddings.encode(prompts)  # first: it may need the GPU of an actor
        timeout = self._config.startup_timeout_s
        for pool in self._pools:
            pool.start(self._group)
        await asyncio.gather(self.learner.start(timeout), *(pool.wait_ready(timeout) for pool in self._pools))
        return True

    async def publish(self, version: int) -> PublishedWeights:
        """The learner's LoRA, from now on what rollouts are made with."""
        return PublishedWeights(*await self.learner.publish(version))

    def counts(self) -> dict[str, float]:
        """Actors now, and what went wrong since the last call."""
        return {
            "rollout/actors": len(self._rollout.pids),
            "rollout/units_retried": self._rollout.retried.take(),
            "rollout/restarts": sum(pool.restarts.take() for pool in self._pools),
            **{f"reward/{name}/missing": scorer.missing.take() for name, scorer in self._scorers.items()},
        }

    def stop(self) -> None:
        """End all actors."""
        for pool in self._pools:
            pool.stop()
        self.learner.shutdown()


@asynccontextmanager
async def open_system(config: Config, run: Path, checkpoint: Checkpoint | None) -> AsyncIterator[System]:
    """A system whose actors end with the context. What stops a pool for good is raised in the caller."""
    try:
        async with asyncio.TaskGroup() as group:
            system = System(config, run, checkpoint, group)
            try:
                yield system
            finally:
                system.stop()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _rollout_spawn(config: Config) -> Spawn:
    actor = RolloutActor.options(**ray_options(config.rollout.resources))  # type: ignore[attr-defined]
    return lambda name: actor.remote(name, config)


def _scorer(name: str, config: RewardConfig) -> Scorer:
    actor = RewardActor.options(**ray_options(config.resources))  # type: ignore[attr-defined]

    def spawn(actor_name: str) -> ActorHandle:
        return actor.remote(actor_name, config)

    return Scorer(name, config, Pool(f"reward {name}", spawn, config.replicas, config.max_restarts))
