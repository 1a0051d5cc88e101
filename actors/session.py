"""What the training loop does not show: interruption, stale rollouts, a learner that is lost, what is due when."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from actors.control import follow_lease, require_cluster
from actors.failures import is_lost_object
from actors.interrupt import Interrupt, Interrupted
from actors.learner import LearnerLost
from actors.prometheus import prometheus_sink
from actors.system import System, open_system
from actors.weights import PublishedWeights
from g2rpo_ray.config import Config
from g2rpo_ray.config.resume import settings
from g2rpo_ray.data import Prompts, drawn_prompts, iteration_prompts
from g2rpo_ray.launch.next_steps import next_steps
from g2rpo_ray.record.checkpoint import Checkpoint, find_checkpoint, finish_checkpoint, new_checkpoint, publish_best
from g2rpo_ray.record.journal import Journal, is_finished, summarize
from g2rpo_ray.record.lease import Lease
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.record.tracking import Metrics
from g2rpo_ray.rollout.budget import Budget, in_words
from g2rpo_ray.types import Rollout, Samples

Loop = Callable[["Session"], Awaitable[None]]
T = TypeVar("T")


async def run_session(
    loop: Loop, config: Config, prompts: Prompts, run: Folder, here: Path, checkpoint: Checkpoint | None, lease: Lease
) -> bool:
    """Run the loop from the checkpoint, or the start, to the last iteration; False if somebody asked to end before.

    A learner that is lost is started again from the latest checkpoint, and the iterations since are done again.
    `here` is the run directory, or a copy of it on this machine. A lease that is lost ends the run at once.
    """
    used = drawn_prompts(prompts.train, config.data.prompts_per_iteration, config.seed, config.iterations)
    done = checkpoint.iteration if checkpoint else 0
    interrupt = Interrupt()
    with Journal(config, here, done, [prometheus_sink(config.name)], kept=run, guard=lease.check) as journal:
        async with open_system(System, config, prompts.metadata, run) as system:
            system.watch(follow_lease(lease))
            journal.say(f"{config.name}: starting the actors: prompts are encoded, then model and rewards are loaded")
            if prompts.dropped:
                journal.say(f"{prompts.dropped} training prompts are held out too and are not trained on")
            if not await interrupt.unless(system.start([*used, *prompts.heldout], checkpoint, journal.say)):
                journal.say(f"stopped before anything was computed; {done} iterations are saved")
                return False
            journal.say(f"{config.name}: actors are ready")
            session = Session(config, prompts, run, system, journal, interrupt, checkpoint)
            while not await session.attempt(loop):
                pass
        if not is_finished(config, Folder(here), session.done):
            journal.say(f"stopped after iteration {session.done}, which is saved: the same command goes on from there")
            return False
        journal.say(summarize(config, here))
        journal.report()
        journal.say(next_steps(config, run, session.done))
    return True


class Session:
    """A run that is going on; the loop calls its methods in turn."""

    def __init__(
        self, config: Config, prompts: Prompts, run: Folder, system: System, journal: Journal, interrupt: Interrupt,
        checkpoint: Checkpoint | None,
    ):  # fmt: skip
        self.done = checkpoint.iteration if checkpoint else 0
        """Iterations that are done."""
        self._config, self._prompts, self._run = config, prompts, run
        self._system, self._journal, self._interrupt = system, journal, interrupt
        self._saved, self._restarts = self.done, 0
        self._budget = Budget(config, checkpoint.budget if checkpoint else None)
        self._rollouts: dict[int, asyncio.Task[Rollout]] = {}
        self._weights: PublishedWeights

    async def iterations(self) -> AsyncIterator[int]:
        """Numbers, from 0 up, of the iterations that are left, until somebody asks to end."""
        last = self._config.iterations
        if self._config.rollout.max_staleness and 0 < self.done < last:  # as when the run was not interrupted
            self._sample(self.done, await self._finish("publish again", self._system.publish_again(self.done - 1)))
        self._weights = await self._finish("publish", self._system.publish(self.done))
        if self.done in (self._journal.judged_since, last):
            self._journal.say("sampling and scoring the held-out prompts")
            await self._evaluate(math.nan if self.done else 0.0)
            await asyncio.to_thread(self._journal.report)
        while self.done < last and not self._interrupt and not self._journal.stopped_by:
            yield self.done

    async def rollout(self, iteration: int) -> Rollout:
        """The scored trees of an iteration's prompts; with `max_staleness` the next one's are begun, too."""
        for ahead in range(self._config.rollout.max_staleness + 1):
            self._sample(iteration + ahead, self._weights)
        with self._journal.timed("rollout"):
            rollout = await self._interrupt.unless(self._rollouts.pop(iteration))
        if rollout is None:
            raise Interrupted
        return rollout

    async def update(self, rollout: Rollout) -> Metrics:
        """The learner's step or steps; their metrics."""
        with self._journal.timed("update"):
            on_policy = rollout.weights_version == self.done
            return await self._finish("update", self._system.learner.update(rollout.prompts, on_policy))

    async def publish(self, version: int) -> None:
        """The learner's LoRA, from now on what rollouts are made with."""
        with self._journal.timed("broadcast"):
            self._weights = await self._finish("publish", self._system.publish(version))

    async def record(self, done: int, rollout: Rollout, update: Metrics) -> None:
        """Write the iteration down; evaluate and save where that is due.

        Raises:
            LearnerLost: its node is about to go; what it has done is saved.
        """
        self.done, system = done, self._system
        judged = self._due(self._config.evaluation.every)
        score = await self._evaluate(update["lora/distance"]) if judged else None
        decision = self._budget.learn(done - 1, rollout.prompts)
        if decision:
            self._journal.say(in_words(self._config, decision))
        update = {**update, **self._budget.metrics(done - 1, decision)}
        self._journal.iteration(done, rollout, update, system.counts(), system.take_spans())
        if judged and done < self._config.iterations:
            await asyncio.to_thread(self._journal.report)
        if judged or self._due(self._config.checkpoint.every) or system.learner_leaves:
            await self._save(score)
        if self._journal.stopped_by:
            await asyncio.to_thread(self._end_with_the_best)
        elif system.learner_leaves and done < self._config.iterations:
            raise LearnerLost("its node is about to go")

    async def attempt(self, loop: Loop) -> bool:
        """Run the loop, and save what it did; False if the learner was lost and is started again."""
        try:
            if self._restarts:
                await self._system.start_learner(find_checkpoint(self._run))
                self._journal.say("the learner is ready again")
            await self._save_after(loop)
            return True
        except Exception as error:
            self._restarts += 1
            lost = isinstance(error, LearnerLost) or is_lost_object(error)
            if not lost or self._restarts > self._config.learner.max_restarts:
                raise
            await require_cluster()
            self._go_back(error)
            return False
        finally:
            for task in self._rollouts.values():
                task.cancel()
            self._rollouts.clear()

    async def _save_after(self, loop: Loop) -> None:
        """Run the loop and save what it did, unless the learner did not come back when somebody asked to end."""
        try:
            try:
                await loop(self)
            except Interrupted as end:
                if end.stuck:
                    raise
            if self.done > self._saved:
                await self._save()
        except Interrupted:
            self._journal.say(f"the learner did not answer in time; iterations after {self._saved} are not saved")
            self.done = self._saved

    async def _finish(self, kind: str, call: Awaitable[T]) -> T:
        """What the learner answers; once somebody asked to end, in a while."""
        return await self._interrupt.finish(call, lambda: self._system.learner.ending(kind))

    def _go_back(self, error: Exception) -> None:
        checkpoint = find_checkpoint(self._run)
        self.done = self._saved = checkpoint.iteration if checkpoint else 0
        self._budget = Budget(self._config, checkpoint.budget if checkpoint else None)
        self._journal.say(f"learner lost ({str(error).splitlines()[0]}); going on from iteration {self.done}")
        self._journal.rewind(self.done)

    def _sample(self, iteration: int, weights: PublishedWeights) -> None:
        if iteration not in self._rollouts and iteration < self._config.iterations:
            per_iteration, seed = self._config.data.prompts_per_iteration, self._config.seed
            drawn = iteration_prompts(self._prompts.train, per_iteration, seed, iteration)
            work = self._system.collector.rollout(iteration, drawn, weights, self._budget.choice(iteration))
            self._rollouts[iteration] = asyncio.create_task(work)

    async def _evaluate(self, distance: float = math.nan) -> float | None:
        averaged = self._config.learner.ema is not None
        with self._journal.timed("evaluation"):
            samples = await self._interrupt.unless(self._samples("lora"))
            ema = await self._interrupt.unless(self._samples("ema")) if averaged else None
        if samples is None or (averaged and ema is None):
            return None
        return self._journal.heldout(self.done, samples, distance, ema)

    async def _samples(self, kind: str) -> Samples:
        """Held-out samples of the LoRA that is trained, or of its average."""
        if kind == "lora" and not self._config.learner.average_samples:
            weights = self._weights
        else:
            weights = await self._system.publish(self.done, kind)
        return await self._system.collector.samples(self.done, self._prompts.heldout, weights)

    async def _save(self, score: float | None = None) -> None:
        with self._journal.timed("checkpoint"):
            self._journal.guard()
            files = await self._finish("save", self._system.learner.save(new_checkpoint(self._run, self.done)))
            await asyncio.to_thread(self._journal.keep)  # before there is a checkpoint to go on from
            keep, prompts = self._config.checkpoint.keep, self._prompts
            made_with = settings(self._config, prompts.train, prompts.heldout, prompts.metadata)
            record = (files, keep, made_with, score, self._budget.state)
            await asyncio.to_thread(finish_checkpoint, self._run, self.done, *record)
        self._saved = self.done

    def _end_with_the_best(self) -> None:
        """Leave the adapter of the best checkpoint, of which the hacking panel did not say so."""
        best, names = publish_best(self._run), ", ".join(self._journal.stopped_by)
        lora = f"that of iteration {best}, the best" if best else "the last one: no earlier one was evaluated"
        self._journal.say(f"the hacking panel ({names}) ends the run after {self.done} iterations; lora/ is {lora}")

    def _due(self, every: int) -> bool:
        return self.done == self._config.iterations or (every > 0 and self.done % every == 0)
