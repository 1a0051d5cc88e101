"""The learner's ranks as Ray actors: rendezvous, fan-out, and one answer from many."""

import asyncio
import os
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ray
from safetensors import SafetensorError

from actors.failures import Hung, Patience, first_line, is_death, is_lost_object, within
from actors.keeper import Keeper
from actors.starts import LOOK_EVERY_S, Start, Starts
from g2rpo_ray.config import Config, ray_options
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import FloatArray, PromptRollout, WeightsManifest
from learner.batch import BatchShape, RankMetrics, reduce_metrics, spread

PATIENCE_S = 10.0  # for the death of a rank to be known, after another rank failed for want of it


class LearnerLost(RuntimeError):
    """A rank is gone, and with it the state since the last checkpoint."""


@ray.remote
class LearnerRank:
    """The shell of one rank: sets its environment, resolves references, delegates to a `LearnerEngine`."""

    def __init__(self, config: Config, rank: int) -> None:
        self._config, self._rank = config, rank

    def endpoint(self) -> tuple[str, int]:
        """Where the ranks may meet: this node's address and a port that is free now."""
        address = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def node(self) -> str:
        """Ray's id of its node."""
        return ray.get_runtime_context().get_node_id()

    def start(self, endpoint: tuple[str, int], checkpoint: str | None) -> None:
        address, port = endpoint
        # Ray has made the rank's GPU the only visible one: number 0
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), LOCAL_RANK="0")
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(self._config.learner.ranks))
        if self._config.learner.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        from learner.engine import LearnerEngine  # imports DeepSpeed, which reads the environment

        with Folder(checkpoint).reading() if checkpoint else nullcontext() as path:
            self._engine = LearnerEngine(self._config, self._rank, self._config.learner.ranks, path)

    def update(self, shard: Sequence[PromptRollout], batch: BatchShape) -> RankMetrics:
        return self._engine.update([_fetch(rollout) for rollout in shard], batch)

    def publish(self, version: int, kind: str) -> tuple[WeightsManifest, dict[str, FloatArray]]:
        from g2rpo_ray.models import describe

        state = self.gather(version, kind)
        return describe(state, version), state

    def publish_again(self, version: int) -> tuple[WeightsManifest, dict[str, FloatArray]]:
        """The version before the current one, which a stale rollout is sampled with; known from the checkpoint, too."""
        from g2rpo_ray.models import describe

        state = self._engine.copies.versions[version]
        return describe(state, version), state

    def gather(self, version: int, kind: str) -> dict[str, FloatArray]:
        """What is published; other ranks take part: under ZeRO-3 every rank holds a piece of the LoRA."""
        return self._engine.publish(version, kind)

    def save(self, folder: str) -> dict[str, str]:
        """Write the checkpoint, all of it from rank 0; the checksum of each file as it was before any upload."""
        if self._rank:
            self._engine.save(os.devnull)  # takes part, writes nothing
            return {}
        try:
            with Folder(folder).writing() as path:
                self._engine.save(path)
                return Folder(path).digests()
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the checkpoint could not be written to {folder} ({error}); the one before it is as it was: make room "
                "or mend the storage, then the same command goes on from there"
            ) from None


class LearnerGroup:
    """All ranks of the learner. A call returns when every rank is done, and raises as soon as one of them fails.

    After a failure the other ranks may wait in a collective for ever: `shutdown` is all that can be asked for then.
    A call that takes many times what such calls took is a failure, too: LearnerLost.
    """

    def __init__(self, config: Config, group: asyncio.TaskGroup) -> None:
        self._config, self._group = config, group
        self._patience: dict[str, Patience] = {}
        self._starts = Starts(config.startup_timeout_s)
        self._ranks: list[Any] = []
        self._keeper: Keeper | None = None
        self.node = ""
        """Ray's id of the node where rank 0 runs."""

    async def start(self, timeout: float, checkpoint: Folder | None = None) -> None:
        """Start the ranks, anew if they ran; returns when each has loaded the model and met the others.

        `checkpoint` is the folder, within reach of every rank, of a checkpoint to go on from.

        Raises:
            TimeoutError: not all did within `timeout` seconds.
            LearnerLost: they take many times what they took before.
            Exception: what a rank failed with.
        """
        self.shutdown()
        self._patience = {}  # the first call of each kind may take longer than the next ones
        learner = self._config.learner
        actor = LearnerRank.options(max_restarts=0, **ray_options(learner.resources))  # type: ignore[attr-defined]
        self._ranks = [actor.remote(self._config, rank) for rank in range(learner.ranks)]
        endpoint = self._ranks[0].endpoint.remote()
        folder = None if checkpoint is None else str(checkpoint)
        try:
            await asyncio.wait_for(self._started(rank.start.remote(endpoint, folder) for rank in self._ranks), timeout)
            (self.node,) = await self._ask("node", [self._ranks[0].node.remote()])
            self._keeper = Keeper(self.node, self._group, self._config.hung_after_s)
        except TimeoutError:
            raise TimeoutError(
                f"learner: not all {learner.ranks} ranks started within {timeout:g} s; does the cluster have the "
                "resources that learner.ranks and learner.resources ask for? `ray status` shows what is waiting"
            ) from None

    async def _started(self, calls: "Iterable[ray.ObjectRef[Any]]") -> None:
        ready, start = asyncio.ensure_future(_all(calls)), Start(self._ranks)
        try:
            while not (await asyncio.wait([ready], timeout=LOOK_EVERY_S))[0]:
                await start.look()
                if reason := self._starts.hung(start):
                    raise LearnerLost(f"its ranks are taken for hung: {reason}")
            await ready
            self._starts.took(start)
        finally:
            ready.cancel()

    async def update(self, rollouts: Sequence[PromptRollout], on_policy: bool = True) -> dict[str, float]:
        """One iteration's update; the metrics, by name, over all ranks.

        `on_policy`: the rollouts were sampled with the weights that are updated, so that the ratio must begin at 1.
        """
        shards = spread(rollouts, len(self._ranks))
        batch = BatchShape.of(shards, self._config.learner, on_policy)
        calls = [rank.update.remote(shard, batch) for rank, shard in zip(self._ranks, shards, strict=True)]
        parts = await self._ask("update", calls)
        return reduce_metrics(parts)

    async def publish(
        self, version: int, kind: str = "rollouts"
    ) -> tuple[WeightsManifest, "ray.ObjectRef[dict[str, FloatArray]]"]:
        """A policy of the engine's as one object in the store, and what its receivers must find.

        This process owns the object, as it owns every result of a call it made: it outlives the rank that made it.
        """
        first, *others = self._ranks
        manifest, state = first.publish.options(num_returns=2).remote(version, kind)
        found, *_ = await self._ask("publish", [manifest, *(rank.gather.remote(version, kind) for rank in others)])
        return found, state

    async def publish_again(self, version: int) -> tuple[WeightsManifest, "ray.ObjectRef[dict[str, FloatArray]]"]:
        """The version before the one that was published last, or that the checkpoint holds."""
        manifest, state = self._ranks[0].publish_again.options(num_returns=2).remote(version)
        (found,) = await self._ask("publish again", [manifest])
        return found, state

    async def keep(self, result: "ray.ObjectRef[Any]", at_once: bool) -> None:
        """Have the learner's node fetch what a unit left. While the learner starts again, so will the rollout."""
        if self._keeper:
            await self._keeper.keep(result, at_once)

    async def save(self, folder: Folder) -> dict[str, str]:
        """Write a checkpoint, readable with any number of ranks and any ZeRO stage; SHA-256 of each file, by name."""
        files, *_ = await self._ask("save", [rank.save.remote(str(folder)) for rank in self._ranks])
        return files

    def ending(self, kind: str) -> float:
        """Seconds that a call under way gets once somebody asked to end the run."""
        return self._patience.get(kind, Patience(self._config.hung_after_s)).ending(1)

    async def _ask(self, kind: str, calls: "Sequence[ray.ObjectRef[Any]]") -> list[Any]:
        patience = self._patience.setdefault(kind, Patience(self._config.hung_after_s))
        began = time.monotonic()
        try:
            answers = await within(patience.limit(1), f"{kind}, whose ranks are taken for hung", _all(calls))
        except Hung as error:
            raise LearnerLost(str(error)) from None
        patience.took(time.monotonic() - began, 1)
        return answers

    def shutdown(self) -> None:
        """End the ranks, also those that wait for a dead one."""
        if self._keeper:
            self._keeper.stop()
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks, self._keeper = [], None


async def _all(refs: Iterable["ray.ObjectRef[Any]"]) -> list[Any]:
    """What all ranks return. What one fails with is raised at once, though the others may still block.

    Raises:
        LearnerLost: a rank died, or what it was to fetch was lost; the others may have failed because of that.
    """
    calls = [asyncio.ensure_future(_value(ref)) for ref in refs]
    try:
        return await asyncio.gather(*calls)
    except ray.exceptions.RayError as first:
        await asyncio.wait(calls, timeout=PATIENCE_S)
        errors = [call.exception() for call in calls if call.done() and not call.cancelled()]
        for error in errors:
            if error is not None and (is_death(error) or is_lost_object(error)):
                raise LearnerLost(first_line(error)) from None
        raise first
    finally:
        for call in calls:
            call.cancel()


async def _value(ref: "ray.ObjectRef[Any]") -> Any:
    return await ref


def _fetch(rollout: PromptRollout) -> PromptRollout:
    """The record with arrays in place of references."""
    embedding, trunk, *branches = ray.get([rollout.embedding, rollout.trunk, *rollout.branches])
    return replace(rollout, embedding=embedding, trunk=trunk, branches=tuple(branches))
