"""The learner's ranks as Ray actors: rendezvous, calls to all ranks, and one result from many."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ray
from safetensors import SafetensorError

from g2rpo_ray.actors.pool.actor import RayActor
from g2rpo_ray.actors.pool.device_faults import Quarantine, device_fault, device_faults
from g2rpo_ray.actors.pool.failures import exit_reason, first_line, is_death, is_lost_object
from g2rpo_ray.actors.pool.limits import Hung, Patience, Starts, now, within
from g2rpo_ray.actors.pool.priority import wanted
from g2rpo_ray.actors.workers.keeper import Keeper
from g2rpo_ray.config import Config, ray_options
from g2rpo_ray.learner.batch import BatchShape, RankMetrics, Update, reduce_metrics, spread
from g2rpo_ray.rollout.plan import with_credit_scores
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import FloatArray, PromptRollout, WeightsManifest
from g2rpo_ray.version import check_code, code_version

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 30.0  # between two lines about ranks without a place
POLL_INTERVAL_S = 1.0  # of the check for a hung start
DEATH_NOTICE_S = 10.0  # to learn of a dead rank after another rank failed because of it


class LearnerLost(RuntimeError):
    """A rank died or hung; the state since the last checkpoint is lost."""

    rank: int | None = None
    error: BaseException | None = None
    """The error of that rank, if known."""


@ray.remote
class LearnerRank:
    """The Ray actor of one rank: sets its environment, resolves references, delegates to a `LearnerEngine`."""

    def __init__(self, config: Config, rank: int) -> None:
        self._config, self._rank = config, rank
        self._updated = False

    def endpoint(self) -> tuple[str, int]:
        """The rendezvous of the ranks: this node's address, and a port that this process opens and keeps."""
        from g2rpo_ray.learner.rendezvous import serve

        address = ray.util.get_node_ip_address()
        self._store = serve(address)
        return address, self._store.port

    def node(self, code: str) -> str:
        """Ray's id of its node; ValueError if its code differs from the run's, whose version is given."""
        check_code(code)
        return ray.get_runtime_context().get_node_id()

    def start(self, endpoint: tuple[str, int], checkpoint: str | None) -> None:
        from g2rpo_ray.learner.rendezvous import set_environment

        set_environment(self._rank, self._config.learner.ranks, *endpoint, self._config.learner.device)
        from g2rpo_ray.learner.engine import LearnerEngine  # imports DeepSpeed, which reads the environment

        with device_faults(memory=False), Folder(checkpoint).reading() if checkpoint else nullcontext() as path:
            self._engine = LearnerEngine(self._config, self._rank, self._config.learner.ranks, path)

    def update(self, shard: Sequence[PromptRollout], batch: BatchShape) -> RankMetrics:
        rollouts = [_fetch(rollout) for rollout in shard]
        with device_faults(memory=self._updated):  # the first update shows whether the settings fit the device
            metrics = self._engine.update(rollouts, batch)
        self._updated = True
        return metrics

    def publish(self, version: int, kind: str) -> tuple[WeightsManifest, dict[str, FloatArray]]:
        from g2rpo_ray.models import manifest_of

        state = self.gather(version, kind)
        return manifest_of(state, version), state

    def publish_again(self, version: int) -> tuple[WeightsManifest, dict[str, FloatArray]]:
        """The version before the current one, for a stale rollout; after a restart it comes from the checkpoint."""
        from g2rpo_ray.models import manifest_of

        state = self._engine.copies.versions[version]
        return manifest_of(state, version), state

    def gather(self, version: int, kind: str) -> dict[str, FloatArray]:
        """The LoRA to publish. All ranks take part, since under ZeRO-3 each holds a part of it."""
        with device_faults():
            return self._engine.publish(version, kind)

    def save(self, folder: str) -> dict[str, str]:
        """Write the checkpoint, which rank 0 does; the SHA-256 of each file before the upload, by name."""
        if self._rank:
            with device_faults():
                self._engine.save(os.devnull)  # takes part in collectives, writes nothing
            return {}
        try:
            with device_faults(), Folder(folder).writing() as path:
                self._engine.save(path)
                return Folder(path).digests()
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the checkpoint could not be written to {folder} ({error}). The one before it is intact: "
                "free space or repair the storage, then run the same command to resume"
            ) from None


class LearnerGroup:
    """All ranks of the learner. A call returns when every rank has finished, and raises as soon as one fails.

    After a failure the other ranks may block in a collective for ever; then only `shutdown` may be called. A call that
    exceeds its time limit raises LearnerLost.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._patience: dict[str, Patience] = {}
        self._starts = Starts(config.startup_timeout_s)
        self._ranks: list[Any] = []
        self._placed: list[ray.ObjectRef[str]] = []  # during a start: the node of each rank, once it has a process
        self.name = "the learner"
        self.resources = config.learner.resources
        """Ray resources of each rank."""
        self._keeper: Keeper | None = None
        self._quarantine = Quarantine()
        self.nodes: set[str] = set()
        """Ray's ids of the nodes of the ranks, once they have started."""

    async def start(self, timeout: float, checkpoint: Folder | None = None) -> None:
        """Start or restart the ranks; returns when each has loaded the model and joined the process group.

        Args:
            timeout: seconds.
            checkpoint: folder of the checkpoint to resume from, which every rank can read.

        Raises:
            TimeoutError: not all ranks started in time.
            LearnerLost: a rank hung or died.
            Exception: the error of a rank.
        """
        self.shutdown()
        self._patience = {}  # the first call of each kind may take longer than later ones
        learner = self._config.learner
        options = ray_options(learner.resources, learner.runtime_env)
        actor = LearnerRank.options(max_restarts=0, **options)  # type: ignore[attr-defined]
        self._ranks = [actor.remote(self._config, rank) for rank in range(learner.ranks)]
        self._placed = [rank.node.remote(code_version()) for rank in self._ranks]
        try:
            async with asyncio.timeout(timeout):
                first, *others = await self._start_ranks(checkpoint)
            self.nodes = {first, *others}
            self._keeper = Keeper(first, self._config.hung_after_s)
        except TimeoutError:
            raise TimeoutError(
                f"learner: not all {learner.ranks} ranks started within {timeout:g} s, startup_timeout_s; "
                f"{self._count_placed()}; learner.resources: {await wanted(self.resources)}"
            ) from None
        except LearnerLost as lost:
            self._keep_device(lost)
            raise
        finally:
            self._placed = []

    @property
    def waiting(self) -> int:
        """Number of ranks without a process, during a start."""
        if not self._placed:
            return 0
        return len(ray.wait(self._placed, num_returns=len(self._placed), timeout=0)[1])

    async def wait_placed(self, limit_s: float) -> None:
        """Wait until all ranks have a process, for at most `limit_s` seconds."""
        until = now() + limit_s
        while self.waiting and now() < until:
            await asyncio.sleep(limit_s / 20)

    def _count_placed(self) -> str:
        return f"{len(self._ranks) - self.waiting} of {len(self._ranks)} have a place"

    async def _start_ranks(self, checkpoint: Folder | None) -> list[str]:
        """Start the engines as soon as all ranks have a process; Ray's ids of their nodes."""
        nodes = await _all_while(self._placed, LOG_INTERVAL_S, self._log_missing)
        began = now()
        endpoint = self._ranks[0].endpoint.remote()
        folder = None if checkpoint is None else str(checkpoint)
        starts = [rank.start.remote(endpoint, folder) for rank in self._ranks]
        await _all_while(starts, POLL_INTERVAL_S, lambda: self._find_hung_start(now() - began))
        self._starts.took(now() - began)
        return nodes

    async def _log_missing(self) -> None:
        needs = await wanted(self.resources)
        logger.warning("learner: %s of its ranks; learner.resources: %s", self._count_placed(), needs)

    async def _find_hung_start(self, seconds: float) -> None:
        if reason := self._starts.hung(seconds):
            raise LearnerLost(f"its ranks hung: {reason}")

    async def update(self, rollouts: Sequence[PromptRollout], on_policy: bool = True) -> Update:
        """One iteration's update; the metrics over all ranks, and what probes tell.

        `on_policy`: whether the rollouts were sampled with the weights to update, so that the first ratio must be 1.
        """
        shards = spread(with_credit_scores(rollouts, self._config), len(self._ranks))
        batch = BatchShape.of(shards, self._config.learner, on_policy)
        calls = [rank.update.remote(shard, batch) for rank, shard in zip(self._ranks, shards, strict=True)]
        parts = await self._ask("update", calls)
        return Update(reduce_metrics(parts), parts[0].alignment)

    async def publish(
        self, version: int, kind: str = "rollouts"
    ) -> tuple[WeightsManifest, "ray.ObjectRef[dict[str, FloatArray]]"]:
        """Put a policy of the engine into the object store; its manifest and the reference.

        This process owns the object, as it owns the results of its calls. So it outlives the learner's process.
        """
        first, *others = self._ranks
        manifest, state = first.publish.options(num_returns=2).remote(version, kind)
        found, *_ = await self._ask("publish", [manifest, *(rank.gather.remote(version, kind) for rank in others)])
        return found, state

    async def publish_again(self, version: int) -> tuple[WeightsManifest, "ray.ObjectRef[dict[str, FloatArray]]"]:
        """The version before the one that was published last, which the checkpoint also holds."""
        manifest, state = self._ranks[0].publish_again.options(num_returns=2).remote(version)
        (found,) = await self._ask("publish again", [manifest])
        return found, state

    async def keep(self, result: "ray.ObjectRef[Any]") -> None:
        """Prefetch a unit's result to the learner's node. While the learner restarts, nothing is prefetched."""
        if self._keeper:
            await self._keeper.keep(result)

    async def save(self, folder: Folder) -> dict[str, str]:
        """Write a checkpoint for any number of ranks and any ZeRO stage; the SHA-256 of each file, by name."""
        files, *_ = await self._ask("save", [rank.save.remote(str(folder)) for rank in self._ranks])
        return files

    def ending(self, kind: str) -> float:
        """Time limit of a running call after a shutdown was requested, seconds."""
        return self._patience.get(kind, Patience(self._config.hung_after_s)).ending(1)

    async def _ask(self, kind: str, calls: "Sequence[ray.ObjectRef[Any]]") -> list[Any]:
        patience = self._patience.setdefault(kind, Patience(self._config.hung_after_s))
        began = now()
        try:
            answers = await within(patience.limit(1), f"{kind}: the ranks hung", _all(calls))
        except Hung as error:
            raise LearnerLost(str(error)) from None
        except LearnerLost as lost:
            self._keep_device(lost)
            raise
        patience.took(now() - began, 1)
        return answers

    def _keep_device(self, lost: LearnerLost) -> None:
        """Keep a rank alive if its device is quarantined."""
        if (
            lost.rank is not None
            and lost.error
            and self._quarantine.holds(lost.error, RayActor(self._ranks[lost.rank]))
        ):
            del self._ranks[lost.rank]

    def shutdown(self) -> None:
        """End the ranks, also those that block in a collective, but not those that hold quarantined devices."""
        if self._keeper:
            self._keeper.stop()
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks, self._keeper, self.nodes = [], None, set()

    def stop(self) -> None:
        """End everything, quarantined ranks included."""
        self.shutdown()
        self._quarantine.release()


async def _all(refs: Sequence["ray.ObjectRef[Any]"]) -> list[Any]:
    """The results of all ranks. The error of one is raised at once, even if the others block.

    Raises:
        LearnerLost: a rank died, or an object that it fetched was lost; others may have failed because of that.
    """
    calls = [asyncio.ensure_future(_value(ref)) for ref in refs]
    try:
        return await asyncio.gather(*calls)
    except ray.exceptions.RayError as first:
        await asyncio.wait(calls, timeout=DEATH_NOTICE_S)
        errors = [(rank, call.exception()) for rank, call in enumerate(calls) if call.done() and not call.cancelled()]
        lost = [(rank, error) for rank, error in errors if error and (is_death(error) or is_lost_object(error))]
        if not lost:
            raise first
        # the error of a failed device before those of the ranks that waited for it
        raise _lost(*max(lost, key=lambda found: bool((fault := device_fault(found[1])) and fault.device))) from None
    finally:
        for call in calls:
            call.cancel()


async def _all_while(
    refs: Sequence["ray.ObjectRef[Any]"], every_s: float, look: Callable[[], Awaitable[None]]
) -> list[Any]:
    """The same, with a call of `look` every `every_s` seconds until then, which may raise."""
    answers = asyncio.ensure_future(_all(refs))
    try:
        while not (await asyncio.wait([answers], timeout=every_s))[0]:
            await look()
        return await answers
    finally:
        answers.cancel()


def _lost(rank: int, error: BaseException) -> LearnerLost:
    told = isinstance(error, ray.exceptions.RuntimeEnvSetupError) or device_fault(error)
    lost = LearnerLost(exit_reason(error) if told else first_line(error))
    lost.rank, lost.error = rank, error
    return lost


async def _value(ref: "ray.ObjectRef[Any]") -> Any:
    return await ref


def _fetch(rollout: PromptRollout) -> PromptRollout:
    """The record with arrays in place of references."""
    embedding, trunk, *branches = ray.get([rollout.embedding, rollout.trunk, *rollout.branches])
    return replace(rollout, embedding=embedding, trunk=trunk, branches=tuple(branches))
