"""All actors of a run: starts, watches and ends them together."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from g2rpo_ray.actors.cluster import at_end
from g2rpo_ray.actors.collector import Collector
from g2rpo_ray.actors.control import follow_cluster, follow_requests, require_cluster
from g2rpo_ray.actors.pool.actor import RayActor
from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.actors.pool.failures import is_death
from g2rpo_ray.actors.pool.priority import make_room
from g2rpo_ray.actors.workers.encoder import Embeddings, Say
from g2rpo_ray.actors.workers.fetch import fetch_models
from g2rpo_ray.actors.workers.learner import LearnerGroup
from g2rpo_ray.actors.workers.reward import make_scorers
from g2rpo_ray.actors.workers.rollout import RolloutActor
from g2rpo_ray.actors.workers.weights import PublishedWeights
from g2rpo_ray.config import Config, Resources, ray_options
from g2rpo_ray.runs.checkpoint import Checkpoint
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import Metadata, Span

LEARNER_HEAD_START_S = 2.0  # before other actors may take the learner's place


class System:
    """Encoder, rollout pool, reward pools, learner and collector of a run."""

    def __init__(self, config: Config, metadata: Mapping[str, Metadata], run: Folder, group: asyncio.TaskGroup):
        self._config = config
        self._group = group
        self._watchers: list[asyncio.Task[None]] = []
        self._leaving: set[str] = set()
        self._embeddings = Embeddings(config, config.data.embeddings or str(run / "embeddings"), metadata)
        self._rollout = _rollout_pool(config)
        self._completions = _completions_pool(config) if config.rollout.completions.apart else self._rollout
        self._timeline: list[Span] = []
        self._scorers = make_scorers(config, self._timeline, metadata)
        own = {name: scorer.pool for name, scorer in self._scorers.items() if scorer.pool.name == f"reward {name}"}
        self._pools = {**own, "rollout": self._rollout}
        if self._completions is not self._rollout:
            self._pools["completions"] = self._completions
        self._actors = {name: pool.actors for name, pool in self._pools.items()}
        self.learner = LearnerGroup(config)
        self.collector = Collector(
            config, self._embeddings, self._rollout, self._completions, self._scorers, self.learner.keep, self._timeline
        )

    async def start(self, prompts: Sequence[str], checkpoint: Checkpoint | None, say: Say) -> Literal[True]:
        """Fetch models, encode prompts, start all actors; returns when the learner and enough others are ready."""
        await fetch_models(self._config, say)
        await self._embeddings.encode(prompts, say)  # first: it may need the GPU of an actor
        await asyncio.gather(self.start_learner(checkpoint), self._start_others(say))
        return True

    async def _start_others(self, say: Say) -> None:
        await self.learner.wait_placed(LEARNER_HEAD_START_S)
        self._start_pools()
        self.watch(follow_requests(self._config.name, self._actors, say))
        await self._ready()

    async def _ready(self) -> None:
        """Wait for enough actors of each kind. ValueError if no reward can score a held-out image."""
        await asyncio.gather(
            self._rollout.actors.wait_ready(),
            self._completions.actors.wait_ready(),
            *(scorer.wait_ready() for scorer in self._scorers.values()),
        )
        if all(scorer.takes_groups for scorer in self._scorers.values()):
            raise ValueError(
                f"eval_rewards: {', '.join(self._scorers)} compares images of a group, so it cannot score held-out "
                "images; add a reward that scores single images"
            )

    def _start_pools(self) -> None:
        for pool in self._pools.values():
            pool.start(self._group)
        self.watch(follow_cluster(self._leave))
        supervisors = list(self._actors.values())
        self.watch(make_room([self.learner, *supervisors], supervisors[::-1]))

    def watch(self, watch: Coroutine[Any, Any, None]) -> None:
        """Run this while the run lasts; an exception of it ends the run."""
        self._watchers.append(self._group.create_task(watch))

    async def start_learner(self, checkpoint: Checkpoint | None) -> None:
        """Start or restart the learner, from a checkpoint or from the beginning."""
        await self.learner.start(self._config.startup_timeout_s, checkpoint.folder if checkpoint else None)

    async def publish(self, version: int, kind: str = "rollouts") -> PublishedWeights:
        """Publish the learner's LoRA for rollouts; of another `kind`, for evaluation."""
        return PublishedWeights(*await self.learner.publish(version, kind))

    async def publish_again(self, version: int) -> PublishedWeights:
        """Publish the version before it, for a stale rollout."""
        return PublishedWeights(*await self.learner.publish_again(version))

    def counts(self) -> dict[str, float]:
        """Number of actors, and faults since the last call."""
        computing = {self._rollout, self._completions}
        apart = {"completions/actors": len(self._completions.actors.places)} if len(computing) > 1 else {}
        return {
            "rollout/actors": len(self._rollout.actors.places),
            **apart,
            "rollout/units_retried": sum(pool.retried.take() for pool in computing),
            "pool/restarts": sum(actors.restarts.take() for actors in self._actors.values()),
            "pool/hung": sum(actors.hung.take() for actors in self._actors.values()),
            "rollout/copies": sum(pool.copied.take() for pool in computing),
            "perf/lost_s": sum(pool.lost_seconds.take() for pool in self._pools.values()),
            **{f"reward/{name}/missing": scorer.missing.take() for name, scorer in self._scorers.items()},
        }

    def take_spans(self) -> list[Span]:
        """Spans of the actors since the last call."""
        spans = list(self._timeline)
        self._timeline.clear()
        return spans

    @property
    def learner_leaves(self) -> bool:
        """Whether a node of the learner is being drained."""
        return bool(self.learner.nodes & self._leaving)

    def _leave(self, nodes: set[str]) -> None:
        """Move actors off nodes that are being drained."""
        self._leaving |= nodes
        for actors in self._actors.values():
            actors.leave(nodes)

    def stop(self) -> None:
        """End all actors, unless the cluster is lost."""
        for watcher in self._watchers:
            watcher.cancel()
        supervisors = list(self._actors.values())
        for actors in supervisors:  # first, since the group waits for these tasks even if Ray does not answer
            actors.cancel()
        at_end(*(actors.stop for actors in supervisors), self.learner.stop)


S = TypeVar("S", bound=System)


@asynccontextmanager
async def open_system(
    kind: type[S], config: Config, metadata: Mapping[str, Metadata], folder: Folder
) -> AsyncIterator[S]:
    """A system whose actors end with the context. Errors that stop a pool are raised in the caller.

    `metadata`: of each prompt, passed to rewards that accept it.
    """
    try:
        async with asyncio.TaskGroup() as group:
            system = kind(config, metadata, folder, group)
            try:
                yield system
            finally:
                system.stop()
    except BaseExceptionGroup as errors:
        error = errors.exceptions[0]
        if is_death(getattr(error, "cause", error)):
            await require_cluster()  # raises ClusterLost, which says more
        raise error from None


def _rollout_pool(config: Config) -> Pool:
    rollout = config.rollout
    units = "exact" if rollout.completions.apart else "all"
    return _computing_pool(config, "rollout", units, rollout.max_actors, rollout.min_actors, rollout.resources)


def _completions_pool(config: Config) -> Pool:
    given = config.rollout.completions
    return _computing_pool(
        config, "completions", "completions", given.max_actors, given.min_actors, given.resources, given.compile
    )


def _computing_pool(
    config: Config, name: str, units: str, size: int, minimum: int, resources: Resources, compiled: bool = False
) -> Pool:
    """A pool of rollout actors that compute only such units."""
    rollout = config.rollout
    actor = RolloutActor.options(**ray_options(resources, rollout.runtime_env))  # type: ignore[attr-defined]
    return Pool(
        name,
        lambda actor_name: RayActor(actor.remote(actor_name, config, units)),
        size,
        minimum=minimum,
        max_restarts=rollout.max_restarts,
        patience_s=config.startup_timeout_s,
        hung_after_s=config.hung_after_s,
        peers=not (compiled or rollout.compile),
        copies=True,
        max_unused=rollout.max_unscored_units,
        resources=resources,
    )
