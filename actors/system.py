"""All that works for a run on the cluster: started together, watched together, ended together."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from actors.cluster import at_end
from actors.collector import Collector
from actors.control import follow_cluster, follow_requests, require_cluster
from actors.encoder import Embeddings, Say
from actors.failures import is_death
from actors.learner import LearnerGroup
from actors.pool import Pool
from actors.reward import make_scorers
from actors.rollout import RolloutActor
from actors.weights import PublishedWeights
from g2rpo_ray.config import Config, ray_options
from g2rpo_ray.record.checkpoint import Checkpoint
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import Metadata, Span


class System:
    """The stations of an iteration, and the pools that keep them staffed."""

    def __init__(self, config: Config, metadata: Mapping[str, Metadata], run: Folder, group: asyncio.TaskGroup):
        self._config = config
        self._group = group
        self._watchers: list[asyncio.Task[None]] = []
        self._leaving: set[str] = set()
        self._embeddings = Embeddings(config, config.data.embeddings or str(run / "embeddings"))
        self._rollout = _rollout_pool(config)
        self._timeline: list[Span] = []
        self._scorers = make_scorers(config, self._timeline, metadata)
        own = {name: scorer.pool for name, scorer in self._scorers.items() if scorer.pool.name == f"reward {name}"}
        self._pools = {"rollout": self._rollout, **own}
        self.learner = LearnerGroup(config, group)
        self.collector = Collector(
            config, self._embeddings, self._rollout, self._scorers, self.learner.keep, self._timeline
        )

    async def start(self, prompts: Sequence[str], checkpoint: Checkpoint | None, say: Say) -> Literal[True]:
        """Encode the prompts, then start all actors; returns when the learner and enough of each kind can work."""
        await self._embeddings.encode(prompts, say)  # first: it may need the GPU of an actor
        self._start_pools()
        self.watch(follow_requests(self._config.name, self._pools, say))
        await asyncio.gather(self.start_learner(checkpoint), self._ready())
        return True

    async def _ready(self) -> None:
        """Wait for enough of each kind. ValueError, in one line, where no reward can judge a held-out image."""
        await asyncio.gather(self._rollout.wait_ready(), *(scorer.wait_ready() for scorer in self._scorers.values()))
        if all(scorer.takes_groups for scorer in self._scorers.values()):
            raise ValueError(
                f"eval_rewards: {', '.join(self._scorers)} compares images of a group, which tells nothing of "
                "held-out images; add a reward that scores images"
            )

    def _start_pools(self) -> None:
        for pool in self._pools.values():
            pool.start(self._group)
        self.watch(follow_cluster(self._leave))

    def watch(self, watch: Coroutine[Any, Any, None]) -> None:
        """Do this for as long as the run goes on; what it raises ends the run."""
        self._watchers.append(self._group.create_task(watch))

    async def start_learner(self, checkpoint: Checkpoint | None) -> None:
        """Start the learner, or start it again, from a checkpoint or from the beginning."""
        await self.learner.start(self._config.startup_timeout_s, checkpoint.folder if checkpoint else None)

    async def publish(self, version: int, kind: str = "rollouts") -> PublishedWeights:
        """The learner's LoRA, from now on what rollouts are made with; of another `kind`, what is evaluated."""
        return PublishedWeights(*await self.learner.publish(version, kind))

    async def publish_again(self, version: int) -> PublishedWeights:
        """The version before it, for a rollout that is one behind."""
        return PublishedWeights(*await self.learner.publish_again(version))

    def counts(self) -> dict[str, float]:
        """Actors now, and what went wrong since the last call."""
        return {
            "rollout/actors": len(self._rollout.pids),
            "rollout/units_retried": self._rollout.retried.take(),
            "rollout/restarts": sum(pool.restarts.take() for pool in self._pools.values()),
            "rollout/hung": sum(pool.hung.take() for pool in self._pools.values()),
            "rollout/copies": self._rollout.copied.take(),
            "perf/lost_s": sum(pool.lost_seconds.take() for pool in self._pools.values()),
            **{f"reward/{name}/missing": scorer.missing.take() for name, scorer in self._scorers.items()},
        }

    def take_spans(self) -> list[Span]:
        """What the actors did since the last call."""
        spans = list(self._timeline)
        self._timeline.clear()
        return spans

    @property
    def learner_leaves(self) -> bool:
        """Whether the learner's node is about to go."""
        return self.learner.node in self._leaving

    def _leave(self, nodes: set[str]) -> None:
        """Move off nodes that are about to go."""
        self._leaving |= nodes
        for pool in self._pools.values():
            pool.leave(nodes)

    def stop(self) -> None:
        """End all actors, unless there is no cluster that could."""
        for watcher in self._watchers:
            watcher.cancel()
        at_end(*(pool.stop for pool in self._pools.values()), self.learner.shutdown)


S = TypeVar("S", bound=System)


@asynccontextmanager
async def open_system(
    kind: type[S], config: Config, metadata: Mapping[str, Metadata], folder: Folder
) -> AsyncIterator[S]:
    """A system whose actors end with the context. What stops a pool for good is raised in the caller.

    `metadata`, by prompt, is what its rewards are told beside the prompts.
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
            await require_cluster()  # a better word for it
        raise error from None


def _rollout_pool(config: Config) -> Pool:
    rollout = config.rollout
    actor = RolloutActor.options(**ray_options(rollout.resources))  # type: ignore[attr-defined]
    return Pool(
        "rollout",
        lambda name: actor.remote(name, config),
        rollout.max_actors,
        minimum=rollout.min_actors,
        max_restarts=rollout.max_restarts,
        patience_s=config.startup_timeout_s,
        hung_after_s=config.hung_after_s,
        peers=not rollout.compile,
        copies=True,
        max_unused=max(rollout.max_unscored_units, 2 * rollout.max_actors),
        resources=rollout.resources,
    )
