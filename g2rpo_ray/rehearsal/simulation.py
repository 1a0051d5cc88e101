"""Simulates a run in virtual time, by discrete events: the plan's units and the pools' rules, without Ray and tensors.

    prompt ─► trunk ─► branch units ─► scores ─┐
              └─ rollout actors ─┘ └ servers ┘ ├─► update ─► publish ─► next iteration
                                               └────── learner ──────┘

Not simulated: startup, checkpoints, failures, copies of late units, exact completions for comparison, and networks.
"""

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from g2rpo_ray.actors.pool.order import PREFETCH_S, most_unused, urgency
from g2rpo_ray.algo.tree import Tree
from g2rpo_ray.config import Config
from g2rpo_ray.learner.batch import BatchShape, spread
from g2rpo_ray.rehearsal.times import Times, pieces, total
from g2rpo_ray.rewards import serving
from g2rpo_ray.rollout.cost import LATENT_BYTES, RANK_BYTES
from g2rpo_ray.rollout.plan import Part, branch_part, branch_units, possible_trees, trunk_part
from g2rpo_ray.types import PromptRollout, TrunkUnit

MAX_LOOKS = 4  # iterations that are simulated where their trees differ
Done = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Simulated:
    """Means over the simulated iterations."""

    iteration_s: float
    rollout_s: float  # time that the loop waits for the rollout
    update_s: float
    work_s: float  # busy time of all rollout actors together
    busy: Mapping[str, float]  # busy share of the time: `rollout`, `learner`, and reward servers by name
    waits: Mapping[str, float]  # idle share of the rollout actors' time, by reason, largest first
    peak_bytes: int  # of the object store: images, latents and weights


def simulate(config: Config, times: Times) -> Simulated:
    """Simulate some iterations of `rollout.max_actors` actors. `auto` counts as its costliest choice; no probes."""
    trees, prompts = possible_trees(config, config.sampler.costliest), range(config.data.prompts_per_iteration)
    looks, slides = min(MAX_LOOKS, len(trees)), config.sampler.branch_schedule == "slide"
    firsts = [look * len(trees) // looks for look in range(looks)]
    run = _Run(config, times)
    return run.iterate([[trees[(first + slot * (not slides)) % len(trees)] for slot in prompts] for first in firsts])


def heldout_s(config: Config, times: Times, prompts: int) -> float:
    """Seconds of an evaluation of this number of held-out prompts."""
    return (1 + (config.learner.ema is not None)) * _Run(config, times).look(prompts)


def update_s(config: Config, times: Times, trees: Sequence[Tree]) -> float:
    """Seconds of an iteration's update; `trees` has one tree for each prompt, in order."""
    scores = [np.zeros((len(config.rewards), len(tree.leaf)), np.float32) for tree in trees]
    places = enumerate(zip(trees, scores, strict=True))
    rollouts = [PromptRollout(0, slot, "", tree, found, None, None, ()) for slot, (tree, found) in places]
    batch = BatchShape.of(spread(rollouts, config.learner.ranks), config.learner)
    passes = [pieces(step.states, config.learner.micro_batch) for step in batch.steps]
    return sum(times.step + total(times.states, sizes) for sizes in passes)


class _Clock:
    """Virtual time. Tasks that need more cores than there are slow down by the same factor."""

    def __init__(self, cores: float):
        self.now = 0.0
        self._cores, self._wanted = cores, 0.0
        self._served = 0.0  # progress, in seconds, of a task that ran from the start
        self._order = itertools.count()
        self._running: list[tuple[float, int, float, Done]] = []  # a heap

    def start(self, seconds: float, done: Done, cores: float = 1) -> None:
        """Start a task of this duration; call `done` at its end."""
        self._wanted += cores
        heapq.heappush(self._running, (self._served + seconds, next(self._order), cores, done))

    def advance(self, observe: Callable[[float], None]) -> None:
        """Advance to the end of the next task; call `observe` with the seconds that pass."""
        ends, _, cores, done = heapq.heappop(self._running)
        passed = (ends - self._served) * max(1.0, self._wanted / self._cores)
        observe(passed)
        self.now, self._served, self._wanted = self.now + passed, ends, self._wanted - cores
        done()


class _Pool:
    """Interchangeable actors, with one call at a time each; see `actors.pool.dispatch.Pool`."""

    def __init__(
        self,
        clock: _Clock,
        size: int,
        cores: float,
        limit: float = math.inf,
        handle: Callable[[Done], None] | None = None,
    ):
        """`handle`: has the driver take the result of a call, and then calls its argument."""
        self.size, self.busy_s = size, 0.0
        self.idle = deque(range(size))
        self.waiting: list[tuple[tuple[float, ...], int, float, Done]] = []  # a heap
        self._clock, self._cores, self._order = clock, cores, itertools.count()
        self._unused, self._limit, self._handle = 0, limit, handle
        self._late = [0.0] * size

    def call(self, priority: tuple[float, ...], seconds: float, done: Done) -> None:
        heapq.heappush(self.waiting, (priority, next(self._order), seconds, done))
        self._dispatch()

    def used(self) -> None:
        self._unused -= 1
        self._dispatch()

    def delay(self, seconds: float) -> None:
        """Lengthen the next call of each actor, which fetches weights first."""
        self._late = [seconds] * self.size

    def observe(self, seconds: float) -> None:
        self.busy_s += seconds * (self.size - len(self.idle))

    def _dispatch(self) -> None:
        while self.waiting and self.idle and self._unused < self._limit:
            actor, (*_, seconds, done) = self.idle.popleft(), heapq.heappop(self.waiting)
            late, self._late[actor] = self._late[actor], 0.0
            self._unused += 1
            self._clock.start(seconds + late, partial(self._end, actor, done), self._cores)

    def _end(self, actor: int, done: Done) -> None:
        if self._handle:
            self._handle(partial(self._free, actor, done))
        else:
            self._free(actor, done)

    def _free(self, actor: int, done: Done) -> None:
        self.idle.append(actor)
        self._dispatch()
        done()


@dataclass(slots=True)
class _All:
    """Calls `then` at its `left`-th call."""

    left: int
    then: Done

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            self.then()


@dataclass(frozen=True, slots=True)
class _Unit:
    cost: int  # evaluations
    seconds: float
    images: int
    latents: int  # that it stores for the learner
    trunk: bool = False
    branch: bool = False


@dataclass(slots=True)
class _Rollout:
    """An iteration's rollout, with the numbers of its unfinished trunks and units."""

    trunks: int = 0
    units: int = 0
    latents: int = 0
    done: bool = False

    def end(self) -> None:
        self.done = True


class _Run:
    def __init__(self, config: Config, times: Times):
        self._config, self._times = config, times
        self._clock = clock = _Clock(times.cores)
        rollout, learner, rewards = config.rollout, config.learner, config.all_rewards
        limit = most_unused(rollout.max_unscored_units, rollout.max_actors)
        self._serving = serving(rewards)
        servers = {name: rewards[name] for name in dict.fromkeys(self._serving.values())}
        driver = _Pool(clock, 1, 1)
        handle = partial(driver.call, (0,), times.call) if times.call else None
        self._pools = {
            "rollout": _Pool(clock, rollout.max_actors, rollout.threads, limit, handle),
            "learner": _Pool(clock, 1, learner.ranks * learner.threads, handle=handle),
            **{name: _Pool(clock, reward.replicas, reward.threads, handle=handle) for name, reward in servers.items()},
        }
        if (completions := rollout.completions).apart:
            limit = most_unused(rollout.max_unscored_units, completions.max_actors)
            self._pools["completions"] = _Pool(
                clock, completions.max_actors, rollout.completions_threads, limit, handle
            )
        self._actors, self._learner = self._pools["rollout"], self._pools["learner"]
        self._completing = self._pools.get("completions", self._actors)
        self._planned: dict[Tree, tuple[_Unit, list[_Unit]]] = {}
        self._rollouts: list[_Rollout] = []
        self._waits = defaultdict[str, float](float)
        self._rollout_s = self._update_s = self._work_s = 0.0
        self._images = self._latents = self._peak = 0

    def iterate(self, trees: Sequence[Sequence[Tree]]) -> Simulated:
        """Simulate one iteration for each of these tuples of trees; with staleness, two iterations come before."""
        ahead, each = self._config.rollout.max_staleness, len(trees)
        began = 0.0
        for iteration in range(2 * ahead + each):
            if iteration == 2 * ahead:
                began = self._forget()
            while len(self._rollouts) <= iteration + ahead:
                self._sample(len(self._rollouts), trees[len(self._rollouts) % each])
            asked, rollout = self._clock.now, self._rollouts[iteration]
            self._until(lambda rollout=rollout: rollout.done)  # type: ignore[misc]
            self._rollout_s += self._clock.now - asked
            self._learn(rollout, trees[iteration % each])
        elapsed = self._clock.now - began
        waits = sorted(self._waits.items(), key=lambda waited: -waited[1])
        time = {name: pool.size * elapsed for name, pool in self._pools.items()}
        return Simulated(
            elapsed / each, self._rollout_s / each, self._update_s / each, self._work_s / each,
            {name: pool.busy_s / time[name] for name, pool in self._pools.items()},
            {reason: seconds / time["rollout"] for reason, seconds in waits},
            self._peak + 3 * RANK_BYTES * self._config.lora.rank,
        )  # fmt: skip

    def look(self, prompts: int) -> float:
        """Seconds to sample and score this number of held-out prompts."""
        config, (seeds, steps) = self._config, (self._config.evaluation.seeds, self._config.sampler.steps)
        batches = pieces(seeds, config.rollout.micro_batch) * steps
        seconds = config.sample_cost * total(self._times.evaluations, batches)
        unit = _Unit(config.sample_cost * seeds * steps, seconds + self._besides(seeds), seeds, 0)
        rollout = _Rollout(done=not prompts)
        scored = _All(prompts, rollout.end)
        for _ in range(prompts):
            self._compute(0, rollout, unit, partial(self._score, unit, self._serving, scored))
        self._until(lambda: rollout.done)
        return self._clock.now

    def _forget(self) -> float:
        """Reset the counters; the current time."""
        self._rollout_s = self._update_s = self._work_s = 0.0
        self._waits.clear()
        for pool in self._pools.values():
            pool.busy_s = 0.0
        return self._clock.now

    def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._clock.advance(self._observe)

    def _sample(self, iteration: int, trees: Sequence[Tree]) -> None:
        """Start a rollout."""
        rollout = _Rollout()
        self._rollouts.append(rollout)
        sampled = _All(len(trees), rollout.end)
        for tree in trees:
            trunk, branches = self._plan(tree)
            scored = _All(1 + 2 * len(branches), sampled)
            self._compute(iteration, rollout, trunk, partial(self._grow, iteration, rollout, tree, scored))

    def _grow(self, iteration: int, rollout: _Rollout, tree: Tree, scored: Done) -> None:
        """Start a prompt's branches, after its trunk."""
        trunk, branches = self._plan(tree)
        self._score(trunk, self._serving, scored)
        for unit in branches:
            self._compute(iteration, rollout, unit, partial(self._leave, unit, scored))

    def _leave(self, unit: _Unit, scored: Done) -> None:
        """The learner's node fetches a unit's result while its images are scored."""
        self._clock.start(PREFETCH_S, scored, cores=0)
        self._score(unit, self._config.rewards, scored)

    def _compute(self, iteration: int, rollout: _Rollout, unit: _Unit, done: Done) -> None:
        def end() -> None:
            rollout.units -= 1
            rollout.trunks -= unit.trunk
            rollout.latents += unit.latents
            self._store(unit.latents, unit.images)
            done()

        rollout.units += 1
        rollout.trunks += unit.trunk
        pool = self._completing if unit.branch else self._actors
        self._work_s += unit.seconds * (pool is self._actors)
        pool.call(urgency(iteration, unit.cost, unit.trunk), unit.seconds, end)

    def _score(self, unit: _Unit, rewards: Iterable[str], done: Done) -> None:
        names = dict.fromkeys(self._serving[name] for name in rewards)
        taken = {name: seconds for name in names if (seconds := unit.images * self._times.scores.get(name, 0.0))}

        def end() -> None:
            self._store(0, -unit.images)
            (self._completing if unit.branch else self._actors).used()
            done()

        if not taken:
            end()
        scored = _All(len(taken), end)
        for name, seconds in taken.items():
            self._pools[name].call((0,), seconds, scored)

    def _learn(self, rollout: _Rollout, trees: Sequence[Tree]) -> None:
        """Update and publish; then delete the latents, and have each actor fetch the new weights."""
        ended: list[float] = []
        began = self._clock.now
        for seconds in (update_s(self._config, self._times, trees), self._times.publish):
            number = len(ended) + 1
            self._learner.call((0,), seconds, lambda: ended.append(self._clock.now))
            self._until(lambda number=number: len(ended) == number)  # type: ignore[misc]
        self._update_s += ended[0] - began
        self._store(-rollout.latents, 0)
        for pool in (self._actors, self._completing):
            pool.delay(self._times.receive)

    def _plan(self, tree: Tree) -> tuple[_Unit, list[_Unit]]:
        if tree not in self._planned:
            units, forward = branch_units(self._config, tree, TrunkUnit(0, 0, "")), self._config.learner.forward
            parts = [branch_part(tree, unit, forward) for unit in units]
            self._planned[tree] = self._unit(tree, trunk_part(tree), True), [self._unit(tree, p, False) for p in parts]
        return self._planned[tree]

    def _unit(self, tree: Tree, part: Part, trunk: bool) -> _Unit:
        from g2rpo_ray.algo.growth import batch_sizes  # imports torch

        cost, times = self._config.velocity_cost, self._times
        table = times.evaluations if trunk or times.completions is None else times.completions
        rollout = self._config.rollout
        batches = batch_sizes(tree, part.nodes, rollout.micro_batch if trunk else rollout.completions_batch)
        seconds = cost * total(table, batches) + self._besides(len(part.images))
        return _Unit(
            cost * part.evaluations, seconds, len(part.images), (1 + trunk) * len(part.touched), trunk, not trunk
        )

    def _besides(self, images: int) -> float:
        """Seconds of a unit without its evaluations."""
        passes = pieces(images, self._config.rollout.decode_batch)
        return self._times.unit + total(self._times.decodings, passes)

    def _store(self, latents: int, images: int) -> None:
        """Add to the object store's numbers of latents and images."""
        self._latents += latents
        self._images += images
        pixels = self._config.model.pixels
        self._peak = max(self._peak, pixels * (LATENT_BYTES * self._latents + 3 * self._images))

    def _observe(self, seconds: float) -> None:
        for pool in self._pools.values():
            pool.observe(seconds)
        if seconds and (idle := len(self._actors.idle)):
            self._waits[self._reason()] += seconds * idle

    def _reason(self) -> str:
        """The reason why rollout actors are idle."""
        under_way = [rollout for rollout in self._rollouts if not rollout.done]
        if not under_way:
            return "the update"
        if self._actors.waiting or not any(rollout.units for rollout in under_way):
            return "scores"
        return "trunks" if any(rollout.trunks for rollout in under_way) else "the last units"
