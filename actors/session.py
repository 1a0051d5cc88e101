"""The session of a run, behind the training loop: shutdown, stale rollouts, learner restarts, evaluations, saves."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from g2rpo_ray.actors.control import follow_lease, require_cluster
from g2rpo_ray.actors.interrupt import Interrupt, Interrupted
from g2rpo_ray.actors.pool.failures import is_lost_object
from g2rpo_ray.actors.prometheus import prometheus_sink
from g2rpo_ray.actors.system import System, open_system
from g2rpo_ray.actors.workers.learner import LearnerLost
from g2rpo_ray.actors.workers.weights import PublishedWeights
from g2rpo_ray.config import Config
from g2rpo_ray.config.resume import settings
from g2rpo_ray.data import Prompts, drawn_prompts, iteration_prompts
from g2rpo_ray.data.pictures import shown_sources
from g2rpo_ray.learner.batch import Update
from g2rpo_ray.report.page import write_report
from g2rpo_ray.rollout.auto import Budget, decision_in_words
from g2rpo_ray.rollout.metrics import rollout_metrics
from g2rpo_ray.runs.audit import audit_line
from g2rpo_ray.runs.checkpoint import (
    Checkpoint,
    best_checkpoint,
    find_checkpoint,
    finish_checkpoint,
    is_evaluated,
    judge_checkpoint,
    new_checkpoint,
)
from g2rpo_ray.runs.journal import Journal, has_declined, is_finished, summarize
from g2rpo_ray.runs.lease import Lease
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.runs.tracking import Sink
from g2rpo_ray.types import Rollout, Samples
from g2rpo_ray.version import code_version

Loop = Callable[["Session"], Awaitable[None]]
T = TypeVar("T")


async def run_session(
    loop: Loop, config: Config, prompts: Prompts, run: Folder, here: Path, checkpoint: Checkpoint | None, lease: Lease,
    interrupt: Interrupt, callbacks: Sequence[Sink] = (),
) -> int | None:  # fmt: skip
    """Run the loop from the checkpoint, or from the start; the number of iterations, None after a shutdown request.

    A lost learner restarts from the latest checkpoint, and later iterations are repeated. A lost lease ends the run.

    Args:
        here: the run directory, or a copy of it on this machine.
        callbacks: called with the iteration, counted from 1 (0: before the first), and its metrics.
    """
    used = drawn_prompts(prompts.train, config.data.prompts_per_iteration, config.seed, config.iterations)
    done = checkpoint.iteration if checkpoint else 0
    sinks = [prometheus_sink(config.name), *callbacks]
    shown, size = prompts.heldout[: config.evaluation.grid_prompts], (config.model.height, config.model.width)
    sources = shown_sources(shown, prompts.metadata, size)
    with Journal(config, here, done, sinks, kept=run, guard=lease.check, sources=sources) as journal:
        async with open_system(System, config, prompts.metadata, run) as system:
            system.watch(follow_lease(lease))
            journal.say(f"{config.name}: starting the actors: encoding prompts, then loading model and rewards")
            if prompts.dropped:
                journal.say(f"{prompts.dropped} training prompts are also held out, and are not trained on")
            if not await interrupt.unless(system.start([*used, *prompts.heldout], checkpoint, journal.say)):
                saved = f"{done} iterations are saved"
                journal.say(f"stopped before the first iteration; {saved}. Run the same command again")
                return None
            journal.say(f"{config.name}: actors are ready")
            session = Session(config, prompts, run, here, system, journal, interrupt, checkpoint)
            while not await session.attempt(loop):
                pass
        if not is_finished(config, run, session.done):
            journal.say(f"stopped; iteration {session.done} is saved. Run the same command to resume")
            return None
        journal.say(summarize(config, here, session.done))
        write_report(here, run)
    return session.done


class Session:
    """A running run; the training loop calls its methods in turn."""

    def __init__(
        self, config: Config, prompts: Prompts, run: Folder, here: Path, system: System, journal: Journal,
        interrupt: Interrupt, checkpoint: Checkpoint | None,
    ):  # fmt: skip
        self.done = checkpoint.iteration if checkpoint else 0
        """Number of finished iterations."""
        self._config, self._prompts, self._run, self._here = config, prompts, run, here
        self._system, self._journal, self._interrupt = system, journal, interrupt
        self._saved, self._restarts, self._started = self.done, 0, True
        self._budget = Budget(config, checkpoint.budget if checkpoint else None)
        self._rollouts: dict[int, asyncio.Task[Rollout]] = {}
        self._weights: PublishedWeights

    async def iterations(self) -> AsyncIterator[int]:
        """Numbers of the remaining iterations, counted from 0, until a shutdown is requested."""
        last = self._config.iterations
        if self._config.rollout.max_staleness and 0 < self.done < last:  # as when the run was not interrupted
            self._sample(self.done, await self._finish("publish again", self._system.publish_again(self.done - 1)))
        self._weights = await self._finish("publish", self._system.publish(self.done))
        if self.done == self._journal.first or await self._is_unjudged():
            self._journal.say("sampling and scoring the held-out prompts")
            await self._judge()
            await asyncio.to_thread(write_report, self._here, self._run)
        if self.done > self._journal.first and not await self._is_unjudged():
            await self._answer_decline()  # if the evaluation of the checkpoint was interrupted
        self._journal.start_clock()
        while self.done < last and not self._interrupt and not self._journal.stopped_by:
            yield self.done

    async def rollout(self, iteration: int) -> Rollout:
        """The scored trees of an iteration's prompts; with `max_staleness` the next iteration starts as well."""
        for ahead in range(self._config.rollout.max_staleness + 1):
            self._sample(iteration + ahead, self._weights)
        with self._journal.timed("rollout"):
            rollout = await self._interrupt.unless(self._rollouts.pop(iteration))
        if rollout is None:
            raise Interrupted
        return rollout

    async def update(self, rollout: Rollout) -> Update:
        """The learner's step or steps."""
        with self._journal.timed("update"):
            on_policy = rollout.weights_version == self.done
            return await self._finish("update", self._system.learner.update(rollout.prompts, on_policy))

    async def publish(self, version: int) -> None:
        """Publish the learner's LoRA; later rollouts use it."""
        with self._journal.timed("broadcast"):
            self._weights = await self._finish("publish", self._system.publish(version))

    async def record(self, done: int, rollout: Rollout, update: Update) -> None:
        """Record the iteration; evaluate and save when due.

        Raises:
            LearnerLost: its node is being drained; its work is saved.
        """
        self.done, system, lora = done, self._system, self._weights.manifest.checksum
        judged = self._due(self._config.evaluation.every)
        evaluated, score = await self._evaluate(update.metrics["lora/distance"]) if judged else (False, None)
        if evaluated and await self._answer_decline():
            score = None  # the checkpoint has another policy than the evaluated one
        decision = self._budget.learn(done - 1, update.alignment)
        if decision:
            self._journal.say(decision_in_words(self._config, decision))
        chosen = self._budget.metrics(done - 1, decision)
        metrics = {**rollout_metrics(rollout, self._config), **update.metrics, **chosen}
        units = {report.unit: report.digests for report in sorted(rollout.reports, key=lambda report: report.unit)}
        audit = audit_line(rollout.weights, units, list(self._config.rewards), rollout.prompts)
        audit |= {"lora": lora, "code": code_version()}
        self._journal.iteration(done, metrics, system.counts(), system.take_spans(), audit)
        if judged and done < self._config.iterations:
            await asyncio.to_thread(write_report, self._here, self._run)
        if judged or self._due(self._config.checkpoint.every) or system.learner_leaves:
            await self._save(evaluated, score)
        if system.learner_leaves and done < self._config.iterations and not self._journal.stopped_by:
            raise LearnerLost("its node is being drained")

    async def attempt(self, loop: Loop) -> bool:
        """Run the loop and save its work; False if the learner was lost and has to restart."""
        try:
            if not self._started:
                await self._system.start_learner(find_checkpoint(self._run))
                self._started = True
                self._journal.say("the learner is ready again")
            await self._save_after(loop)
            return True
        except Exception as error:
            if not isinstance(error, LearnerLost) and not is_lost_object(error):
                raise
            planned = self._system.learner_leaves  # a drained node is no fault
            self._restarts += not planned
            if self._restarts > self._config.learner.max_restarts:
                raise
            await require_cluster()
            self._go_back(error, planned)
            self._started = False
            return False
        finally:
            for task in self._rollouts.values():
                task.cancel()
            self._rollouts.clear()

    async def _save_after(self, loop: Loop) -> None:
        """Run the loop and save its work, unless the learner did not answer after a shutdown request."""
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
        """Await a learner call, with a time limit after a shutdown request."""
        return await self._interrupt.finish(call, lambda: self._system.learner.ending(kind))

    def _go_back(self, error: Exception, planned: bool) -> None:
        checkpoint = find_checkpoint(self._run)
        self.done = self._saved = checkpoint.iteration if checkpoint else 0
        self._budget = Budget(self._config, checkpoint.budget if checkpoint else None)
        self._journal.say(f"learner lost ({str(error).splitlines()[0]}); resuming from iteration {self.done}")
        self._journal.rewind(self.done, planned)

    def _sample(self, iteration: int, weights: PublishedWeights) -> None:
        if iteration not in self._rollouts and iteration < self._config.iterations:
            per_iteration, seed = self._config.data.prompts_per_iteration, self._config.seed
            drawn = iteration_prompts(self._prompts.train, per_iteration, seed, iteration)
            work = self._system.collector.rollout(iteration, drawn, weights, self._budget.choice(iteration))
            self._rollouts[iteration] = asyncio.create_task(work)

    async def _is_unjudged(self) -> bool:
        """Whether the evaluation at the checkpoint was due and was interrupted."""
        due = self.done > 0 and self._due(self._config.evaluation.every)
        return due and not await asyncio.to_thread(is_evaluated, self._run, self.done)

    async def _judge(self) -> None:
        """Evaluate the policy at the start of the loop: before training, or a checkpoint's."""
        evaluated, score = await self._evaluate(self._journal.distance(self.done))
        if evaluated and self.done:
            await asyncio.to_thread(self._journal.keep)
            record = (score, self._config.checkpoint.keep, bool(self._journal.stopped_by))
            self._say_stopped(await asyncio.to_thread(judge_checkpoint, self._run, self.done, *record))

    async def _evaluate(self, distance: float) -> tuple[bool, float | None]:
        """Whether the evaluation was finished before a shutdown request, and the score: see `Journal.heldout`."""
        averaged = self._config.learner.ema is not None
        with self._journal.timed("evaluation"):
            samples = await self._interrupt.unless(self._samples("lora"))
            ema = await self._interrupt.unless(self._samples("ema")) if averaged else None
        if samples is None or (averaged and ema is None):
            return False, None
        return True, self._journal.heldout(self.done, samples, distance, ema)

    async def _answer_decline(self) -> bool:
        """Do what `evaluation.on_decline` says about the evaluation just made. True if the learner is another one.

        After finer completions, the next decline is one from that evaluation on: the policy needs time to recover.
        """
        every, answer = self._config.evaluation.every, self._config.evaluation.on_decline
        answered = self._budget.declines
        if answer == "continue" or self.done in answered or self.done == self._config.iterations:
            return False
        if not every or self.done % every:  # an evaluation at the end of a run that was extended later
            return False
        since = answered[-1] if answered and answer == "finer" else 0
        if self._journal.stopped_by or not has_declined(self._config, self._here, self.done, since):
            return False
        stride = self._budget.decline(self.done)
        if stride is None:
            self._journal.say("the trained rewards fell; completions are as fine as they can be, and the run goes on")
            return False
        best = best_checkpoint(self._run) if answer == "rewind" else None
        learner = f" and the learner of iteration {best.iteration}" if best else ""
        self._journal.say(f"the trained rewards fell; the run goes on with stride {stride}{learner}")
        if best:
            await self._system.start_learner(best)
            await self.publish(self.done)
        return best is not None

    async def _samples(self, kind: str) -> Samples:
        """Held-out samples of the trained LoRA, or of its average."""
        if kind == "lora" and not self._config.learner.average_samples:
            weights = self._weights
        else:
            weights = await self._system.publish(self.done, kind)
        return await self._system.collector.samples(self.done, self._prompts.heldout, weights)

    async def _save(self, evaluated: bool = False, score: float | None = None) -> None:
        with self._journal.timed("checkpoint"):
            self._journal.guard()
            files = await self._finish("save", self._system.learner.save(new_checkpoint(self._run, self.done)))
            await asyncio.to_thread(self._journal.keep)  # before the checkpoint exists
            keep, prompts = self._config.checkpoint.keep, self._prompts
            made_with = settings(self._config, prompts.train, prompts.heldout, prompts.metadata)
            record = (files, keep, made_with, score, self._budget.state, evaluated, bool(self._journal.stopped_by))
            published = await asyncio.to_thread(finish_checkpoint, self._run, self.done, *record)
        self._saved = self.done
        self._say_stopped(published)

    def _say_stopped(self, published: int) -> None:
        """Report which adapter lora/ holds, if the hacking panel ends the run."""
        if names := ", ".join(self._journal.stopped_by):
            last = "of the last iteration, since no earlier one was evaluated"
            lora = last if published == self.done else f"of iteration {published}, the best"
            self._journal.say(f"the hacking panel ({names}) ends the run after {self.done} iterations; lora/ is {lora}")

    def _due(self, every: int) -> bool:
        return self.done == self._config.iterations or (every > 0 and self.done % every == 0)
