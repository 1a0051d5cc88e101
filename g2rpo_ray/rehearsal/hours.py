"""Estimates hours and money of a run on other devices by simulation, and the best split of these devices."""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from g2rpo_ray.actors.cluster import demands
from g2rpo_ray.config import Config, RewardConfig
from g2rpo_ray.rehearsal.devices import Fleet
from g2rpo_ray.rehearsal.simulation import Simulated, heldout_s, simulate
from g2rpo_ray.rehearsal.times import Times, of_batch, operations
from g2rpo_ray.rewards import serving

EFFICIENCY = (0.2, 0.55)
"""Share of the dense bfloat16 rate that these networks reach, least and most; measured in docs/planning.md."""
MAX_RATIO = 0.95  # a split is recommended below this share of the configured split's hours or device-hours
TIE = 0.01  # exponent of the number of devices: twice as many must save 0.7 % of the hours
MIN_SHARE = 0.005  # smallest share of the time that is printed
MAX_SIMULATIONS = 12  # of splits, in the order of their lower bounds
MAX_SIZES = 32  # numbers of actors that are tried
SERVER_LOAD = 0.8  # largest load of a reward server: see docs/performance.md
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Hours:
    """Duration of a run, as an interval."""

    config: Config  # with as many actors as fit on the devices
    devices: float  # number of devices that are used
    simulated: Simulated
    looks_s: float  # one evaluation of the held-out prompts, in the simulation
    slower: Interval  # least and greatest ratio of real to simulated durations

    def interval(self, seconds: float) -> Interval:
        """The least and greatest duration of a part that takes `seconds` in the simulation."""
        least, most = self.slower
        return least * seconds, most * seconds

    @property
    def run_h(self) -> Interval:
        config = self.config
        whole = config.iterations * self.simulated.iteration_s + evaluations(config) * self.looks_s
        return self.interval(whole / 3600)


def seconds(operations: float, fleet: Fleet, devices: float) -> Interval:
    """Least and greatest duration of `operations` (in 10^12) on this number of the fleet's devices."""
    most, least = (operations / (devices * fleet.device.tflops * share) for share in EFFICIENCY)
    return least, most


@dataclass(frozen=True, slots=True)
class Estimate:
    """The input of an estimate of hours."""

    times: Times
    slower: Interval  # least and greatest ratio of real durations to `times`
    heldout: int  # number of held-out prompts

    @classmethod
    def of(cls, config: Config, fleet: Fleet, heldout: int) -> "Estimate":
        """From the number of operations and the devices' rate; the model's configuration files must be local."""
        least, most = sorted(1 / share for share in EFFICIENCY)
        return cls(operations(config).scaled(1 / fleet.device.tflops), (least, most), heldout)

    def hours(self, config: Config, fleet: Fleet | None = None) -> Hours:
        """Simulate the run. With 1 / n of a GPU, an actor's parts take n times as long.

        Args:
            fleet: it limits the number of rollout actors; None: `rollout.max_actors` of them.

        Raises:
            ValueError: the run uses no GPUs, or needs more than the fleet has; one line.
        """
        if fleet is None:
            devices = math.nan
        else:
            each, ranks, others = _gpus(config)
            actors = min(config.rollout.max_actors, int((fleet.number - ranks - others) / each))
            if actors < config.rollout.min_actors:
                raise ValueError(
                    f"--devices: {fleet.number} given; the run needs {ranks:g} for the learner, {others:g} for "
                    f"rewards and completions, and at least {config.rollout.min_actors * each:g} for rollout actors; "
                    "give more, or lower the resources"
                )
            config, devices = _split(config, actors, config.learner.ranks), actors * each + ranks + others
        times = self.times.shared(
            *(1 / min(1, section.resources.get("GPU") or 1) for section in (config.rollout, config.learner))
        )
        found = simulate(config, times)
        return Hours(config, devices, found, heldout_s(config, times, self.heldout), self.slower)

    def best(self, now: Hours, fleet: Fleet, goal: Callable[[Hours], float]) -> Hours:
        """The split of the fleet, or of a part of it, with the smallest `goal`; `now` if it is less than 5 % better.

        Splits are simulated in the order of their lower bounds, which assume that no actor waits.
        """
        config, best = now.config, now
        work = self.hours(_split(config, 1, 1))
        splits = list(_splits(config, fleet, work.simulated))
        bounds = [(goal(_unwaited(work, split)), number) for number, split in enumerate(splits)]
        for bound, number in heapq.nsmallest(MAX_SIMULATIONS, bounds):
            if bound < goal(best):
                best = min(best, self.hours(splits[number], fleet), key=goal)
        return best if goal(best) < MAX_RATIO * goal(now) else now


def _unwaited(work: Hours, split: Config) -> Hours:
    """A lower bound of a split's hours, without any waiting, from the simulation with one actor and one rank."""
    actors, alone = split.rollout.max_actors, work.simulated
    prompts, ranks = split.data.prompts_per_iteration, split.learner.ranks
    rollout, update = alone.work_s / actors, alone.update_s * math.ceil(prompts / ranks) / prompts
    iteration = max(rollout, update) if split.rollout.max_staleness else rollout + update
    simulated = replace(alone, iteration_s=iteration, rollout_s=rollout, update_s=update)
    return Hours(split, _used(split), simulated, work.looks_s / actors, work.slower)


def _splits(config: Config, fleet: Fleet, alone: Simulated) -> Iterator[Config]:
    """Splits that fit: numbers of ranks and actors, with enough reward servers for them."""
    prompts, least = config.data.prompts_per_iteration, config.rollout.min_actors
    useful = {math.ceil(prompts / of_a_rank) for of_a_rank in range(1, prompts + 1)}  # others are no faster
    loads = {  # busy seconds of one server an iteration, over its largest load
        name: alone.busy[name] * reward.replicas * alone.iteration_s / SERVER_LOAD
        for name, reward in config.all_rewards.items()
        if alone.busy.get(name)
    }
    for ranks in sorted(useful):
        for actors in _sizes(least, fleet.number):
            replicas = {name: math.ceil(load * actors / alone.work_s) for name, load in loads.items()}
            split = _split(config, actors, ranks, replicas)
            if _used(split) <= fleet.number:
                yield split


def _sizes(least: int, most: int) -> list[int]:
    """The integers from `least` to `most`, or MAX_SIZES of them, evenly spaced."""
    number = min(MAX_SIZES, most - least + 1)
    return sorted({most - (most - least) * place // max(1, number - 1) for place in range(number)})


def _split(config: Config, actors: int, ranks: int, replicas: Mapping[str, int] | None = None) -> Config:
    """The configuration with these numbers of actors, ranks and replicas (by reward)."""

    def served(rewards: Mapping[str, RewardConfig]) -> dict[str, RewardConfig]:
        found = replicas or {}
        return {n: r.model_copy(update={"replicas": found.get(n, r.replicas)}) for n, r in rewards.items()}

    rollout = config.rollout.model_copy(update={"max_actors": actors})
    learner = config.learner.model_copy(update={"ranks": ranks})
    rewards = {"rewards": served(config.rewards), "eval_rewards": served(config.eval_rewards)}
    return config.model_copy(update={"rollout": rollout, "learner": learner, **rewards})


def _used(config: Config) -> float:
    """Number of GPUs of a split's actors, ranks and servers."""
    each, ranks, others = _gpus(config)
    return config.rollout.max_actors * each + ranks + others


def evaluations(config: Config) -> int:
    """Number of held-out evaluations of a run: before the first iteration, every `every`, after the last."""
    every = config.evaluation.every
    return 1 + (math.ceil(config.iterations / every) if every else 1)


def describe_hours(config: Config, heldout: int, fleet: Fleet) -> str:
    """The estimate as lines of text.

    Args:
        config: its pipeline's configuration files must be on this machine, see `rehearsal.published`.
        heldout: number of held-out prompts.
        fleet: devices to estimate for.

    Raises:
        ValueError: see `Estimate.hours`; or the model computes in float32, for which devices have no rate.
    """
    if config.model.dtype == "float32":
        raise ValueError("--devices: rates are of bfloat16 and float16, but model.dtype is float32; set another dtype")
    estimate, (low, high) = Estimate.of(config, fleet, heldout), EFFICIENCY
    each = of_batch(estimate.times.evaluations, 1) * fleet.device.tflops
    rests = (
        f"{each:.3g}e12 operations an evaluation, by PyTorch's count, and {low:.0%} to {high:.0%} of the "
        f"{fleet.device.tflops:g}e12 per second of a {fleet.kind}; without rewards, starting and checkpoints"
    )
    return "\n".join([*_lines(estimate, estimate.hours(config, fleet), fleet), f"rests on:      {rests}"])


def describe_calibrated(config: Config, heldout: int, fleet: Fleet | None, times: Times) -> str:
    """The estimate from measured times, for a fleet of the measured devices; None: for `rollout.max_actors`."""
    estimate = Estimate(times, (1.0, 1.0), heldout)
    unmeasured = sorted(set(serving(config.all_rewards).values()) - set(times.scores))
    where = "on separate devices" if times.cores == math.inf else f"on {times.cores:g} shared cores"
    rests = f"times measured by `g2rpo bench`, {where}; without starting and checkpoints"
    if unmeasured:
        rests += f"; without {', '.join(unmeasured)}, not measured"
    return "\n".join([*_lines(estimate, estimate.hours(config, fleet), fleet), f"rests on:      {rests}"])


def _lines(estimate: Estimate, found: Hours, fleet: Fleet | None) -> list[str]:
    config, simulated = found.config, found.simulated
    order = "at once" if config.rollout.max_staleness else "one after the other"
    time, rollout, update, looks = (
        _duration(found.interval(seconds))
        for seconds in (simulated.iteration_s, simulated.rollout_s, simulated.update_s, found.looks_s)
    )
    always = ("rollout", "learner")
    shares = {name: share for name, share in simulated.busy.items() if name in always or share >= MIN_SHARE}
    busy = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    waits = ", ".join(f"{share:.0%} for {reason}" for reason, share in simulated.waits.items() if share >= MIN_SHARE)
    return [
        f"time:          an iteration takes {time}: rollout {rollout} by {config.rollout.max_actors} actors and update "
        f"{update} by {config.learner.ranks} ranks, {order}",
        f"busy:          {busy}; rollout actors wait {waits or '0%'}; object store at most "
        f"{simulated.peak_bytes / 1e9:.2g} GB",
        f"held out:      {evaluations(config)} evaluations, {looks} each",
        *_money(found, fleet),
        *(_advice(estimate, found, fleet) if fleet else []),
    ]


def _money(found: Hours, fleet: Fleet | None) -> list[str]:
    whole = f"hours:         {interval_in_words(found.run_h)} for {found.config.iterations} iterations"
    if fleet is None:
        return [whole]
    hours, money = [fleet.number * one for one in found.run_h], ""
    if fleet.price is not None:
        money = f"; money {interval_in_words([fleet.price * one for one in hours])}, at {fleet.price:g} each an hour"
    used = f"of {fleet.number} {fleet.kind}, {found.devices:g} of which are used"
    return [f"{whole}; device-hours {interval_in_words(hours)} {used}{money}"]


def _advice(estimate: Estimate, now: Hours, fleet: Fleet) -> list[str]:
    """The fastest and the cheapest split, or `as configured`."""
    goals: dict[str, Callable[[Hours], float]] = {
        "fastest": lambda hours: hours.run_h[0] * hours.devices**TIE,
        "cheapest": lambda hours: hours.run_h[0] * hours.devices,
    }
    lines = []
    for name, goal in goals.items():
        best, advice = estimate.best(now, fleet, goal), "as configured"
        if best is not now:
            keys = {"rollout.max_actors": best.config.rollout.max_actors, "learner.ranks": best.config.learner.ranks}
            changed = [
                f"{key}.replicas={reward.replicas}"
                for key, reward in best.config.rewards_by_key.items()
                if reward.replicas != now.config.rewards_by_key[key].replicas
            ]
            split = ", ".join([*(f"{key}={number}" for key, number in keys.items()), *changed])
            hours = interval_in_words([best.devices * one for one in best.run_h])
            advice = f"{split}: {interval_in_words(best.run_h)} hours, device-hours {hours} of {best.devices:g}"
        lines.append(f"{name + ':':<15}{advice}")
    return lines


def _gpus(config: Config) -> tuple[float, float, float]:
    """Numbers of GPUs of one rollout actor, of all ranks, and of all reward servers and actors of completions."""
    completions = config.rollout.completions
    each = config.rollout.resources.get("GPU", 0)
    taken = {key: number * resources.get("GPU", 0) for key, number, resources in demands(config)}
    taken.pop("rollout.resources")
    taken["rollout.completions.resources"] = completions.max_actors * completions.resources.get("GPU", 0)
    ranks = taken.pop("learner.resources")
    if not each or not ranks:
        raise ValueError(
            "--devices: given, but rollout.resources or learner.resources have no GPU; estimates are for GPUs, add GPU"
        )
    return each, ranks, sum(taken.values())


def _duration(given: Interval) -> str:
    size, unit = next(known for known in ((3600, "h"), (60, "min"), (1, "s")) if given[1] >= known[0] or known[0] == 1)
    return f"{interval_in_words([one / size for one in given])} {unit}"


def interval_in_words(given: Sequence[float]) -> str:
    """Both ends with two digits, or one number if they are equal."""
    return " to ".join(dict.fromkeys(f"{one:,.0f}" if one >= 100 else f"{one:.2g}" for one in given))
