"""Measures the parts of a run on this machine, one after the other: rollout, rewards, a learner of one rank.

Prompt embeddings are noise of the longest prompt's shape: the text does not affect the time. Trees are smaller than the
run's.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from g2rpo_ray.config import Config, ModelConfig, with_settings
from g2rpo_ray.messages import one_line
from g2rpo_ray.models import FlowModel, lora_parameters, manifest_of, verify
from g2rpo_ray.models.estimate import LIBRARIES, count_operations, rollout_memory
from g2rpo_ray.numerics import set_up_torch
from g2rpo_ray.rehearsal.full_size import learner_memory
from g2rpo_ray.rehearsal.times import Times, pieces, total
from g2rpo_ray.rewards import serving
from g2rpo_ray.rewards.pictures import Picture
from g2rpo_ray.rewards.trial import trial
from g2rpo_ray.rollout.plan import branch_part, branch_units, prompt_tree, trunk_part
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import Images, PromptEmbedding, PromptRollout, TrunkUnit

REPEATS = 9  # of a measurement, within the time limit; the result is the median
PRODUCT = 4096  # rows and columns of the matrices that measure the device's rate
PICTURES = 32  # number of images that each reward scores
MOST_COMPETITORS, MEMORY_SHARE = 16, 0.5  # actors that work beside each other, and their share of the free memory


class Bench:
    """Measurements within a time limit."""

    def __init__(self, config: Config, random: bool, limit_s: float, say: Callable[[str], None]):
        """
        Args:
            random: use random weights, and only the model's configuration files.
            limit_s: approximate limit of the total time in seconds; each measurement is made at least once.

        Raises:
            ValueError: one line; there is no such device, or the model cannot be loaded.
        """
        self.config, self._random, self._say = config, random, say
        self._end = time.monotonic() + limit_s
        self.found: dict[str, Any] = {"memory_gib": {}, "same_bits": {}}
        for section, device in (("rollout", config.rollout.device), ("learner", config.learner.device)):
            if device == "cuda" and not torch.cuda.is_available():
                raise ValueError(
                    f"{section}.resources: GPU given, but torch finds no GPU here; "
                    f"give --set '{section}.resources={{CPU: 1}}'"
                )

    def run(self) -> Times:
        """Measure all parts; `found` has the other measurements: memory, rates, reproducibility."""
        with fits("rollout.micro_batch, rollout.decode_batch"):
            times, rollouts = self._rollout()
        scores = self._rewards()
        with fits("learner.micro_batch"):
            states = self._learner(rollouts)
        return self._shared(replace(times, states=states, scores=scores), rollouts[0])

    def _shared(self, times: Times, rollout: PromptRollout) -> Times:
        """The times with what a call costs and, on a CPU, what work costs where actors share its cores."""
        from g2rpo_ray.actors.calls import measure  # imports Ray

        config, cores = self.config, len(os.sched_getaffinity(0))
        work = partial(_branch, _small(config), self._random, rollout)
        actors = _competitors(config, cores) if config.rollout.device == "cpu" else 0
        here = self._seconds(work(), "cpu") if actors else 1.0
        images, left = self._noise(config.rollout.decode_batch), max(0.0, self._end - time.monotonic())
        found = measure(rollout.branches[0], images, work, actors, left)
        self._say(f"a call to an actor: {1e3 * found.call:.3g} ms of CPU time")
        if not actors:
            return replace(times, call=found.call)
        slower, usable = max(1.0, found.alone / here), cores * min(1.0, found.alone / found.beside) - found.ray
        self._say(f"a unit takes {slower:.3g} times as long in an actor as in this process")
        self._say(f"{actors} actors on {cores} cores do the work of {usable:.3g}; Ray itself takes {found.ray:.2g}")
        return replace(times.scaled(slower), call=found.call, cores=max(1.0, usable))

    def _seconds(self, work: Callable[[], Any], device: str) -> float:
        """Median duration after one warm-up call; on one CPU thread the process's CPU time."""
        clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

        def once() -> float:
            began = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            return clock() - began

        once()
        taken = [once()]
        while len(taken) < REPEATS and time.monotonic() < self._end:
            taken.append(once())
        return statistics.median(taken)

    def _random_model(self, config: ModelConfig, device: str) -> FlowModel | None:
        """A model with random weights from a fixed seed; None if the model's own weights are to be loaded."""
        torch.manual_seed(0)
        return FlowModel.skeleton(config, device) if self._random else None

    def _rollout(self) -> tuple[Times, list[PromptRollout]]:
        config, device = _small(self.config), self.config.rollout.device
        set_up_torch(config.deterministic, config.rollout.threads)
        held = _memory(device)
        given = config.rollout_model
        model = self._random_model(given, device) or FlowModel.load(given, device, transformer=True, vae=True)
        sampler, embedding = Sampler(config, model), _embedding(config, model)
        evaluations = self._evaluations(sampler, model, embedding)
        completions = None
        if config.rollout.completions.need_weights:
            completions = self._evaluations(sampler, sampler.completing, embedding)
        sizes = sorted({1, config.rollout.decode_batch})
        latents = {size: torch.randn(size, *model.latent_shape, device=device) for size in sizes}
        decodings = {size: self._seconds(partial(model.decode, x), device) for size, x in latents.items()}
        state = {name: p.detach().float().cpu().numpy() for name, p in lora_parameters(model.transformer).items()}
        manifest = manifest_of(state, 0)
        publish = self._seconds(lambda: manifest_of(state, 0), "cpu")
        receive = self._seconds(partial(verify, state, manifest), "cpu")
        receive += self._seconds(partial(sampler.load_weights, state), device)
        times = Times(evaluations, decodings, {1: 0.0}, completions, publish=publish, receive=receive)
        self._rate(model, times, device)
        times = replace(times, unit=self._unit(config, sampler, embedding, times))
        self.found["memory_gib"]["rollout"] = (
            (_memory(device) - held) / 2**30,
            sum(rollout_memory(config).values()) / 2**30,
        )
        rollouts = self._sampled(config, sampler, embedding)
        return times, rollouts

    def _evaluations(self, sampler: Sampler, model: FlowModel, embedding: PromptEmbedding) -> dict[int, float]:
        """Seconds of an evaluation by the number of latents; a guided velocity has two evaluations."""
        config, device, found = self.config, self.config.rollout.device, {}
        most = max(config.rollout.micro_batch, config.rollout.completions_batch)
        sizes = sorted({most, *(2**power for power in range(most.bit_length()))})
        with torch.inference_mode(), sampler.velocity(embedding, config.sampler.guidance, model) as velocity:
            for size in sizes:
                x, sigma = (
                    torch.randn(size, *model.latent_shape, device=device),
                    torch.full((size,), 0.5, device=device),
                )
                found[size] = self._seconds(partial(velocity, x, sigma), device) / config.velocity_cost
        self._say("an evaluation by batch: " + ", ".join(f"{n}: {s / n:.4g} s" for n, s in found.items()))
        return found

    def _rate(self, model: FlowModel, times: Times, device: str) -> None:
        """Measure the rate of large matrix products, and the share of it that evaluations reach."""
        size, most = PRODUCT if device == "cuda" else PRODUCT // 4, max(times.evaluations)
        a = torch.randn(size, size, device=device, dtype=getattr(torch, self.config.model.dtype))
        rate = 2 * size**3 / self._seconds(lambda: a @ a, device) / 1e12
        counted = most * count_operations(self.config).evaluation
        self.found["matmul_tflops"] = rate
        self.found["share_of_matmul"] = counted / times.evaluations[most] / rate

    def _unit(self, config: Config, sampler: Sampler, embedding: PromptEmbedding, times: Times) -> float:
        """Seconds of a unit without its evaluations and decodings."""
        from g2rpo_ray.algo.growth import batch_sizes

        place = TrunkUnit(0, 0, "", config.sampler.costliest)
        tree = prompt_tree(config, 0, 0, "", place.choice)
        unit = list(branch_units(config, tree, place))[-1]
        trunk, _ = sampler.trunk(place, embedding)
        first, again = (sampler.branch(unit, embedding, trunk) for _ in range(2))
        alike = first[0].latents.tobytes() == again[0].latents.tobytes() and np.array_equal(first[1], again[1])
        self.found["same_bits"]["rollout"] = alike
        rest = []
        for part, work in (
            (trunk_part(tree), lambda: sampler.trunk(place, embedding)),
            (branch_part(tree, unit, config.learner.forward), lambda: sampler.branch(unit, embedding, trunk)),
        ):
            table = times.completions if times.completions and part.edges else times.evaluations
            batch = config.rollout.completions_batch if part.edges else config.rollout.micro_batch
            known = config.velocity_cost * total(table, batch_sizes(tree, part.nodes, batch))
            known += total(times.decodings, pieces(len(part.images), config.rollout.decode_batch))
            taken = self._seconds(work, config.rollout.device)
            rest.append(taken - known)
            self._say(f"a unit of {part.evaluations} evaluations: {taken:.4g} s, of which its parts make {known:.4g} s")
        return max(0.0, statistics.mean(rest))

    def _sampled(self, config: Config, sampler: Sampler, embedding: PromptEmbedding) -> list[PromptRollout]:
        """Rollouts of one prompt, repeated for a full micro-batch of the learner, at most a rank's share."""
        place = TrunkUnit(0, 0, "", config.sampler.costliest)
        tree = prompt_tree(config, 0, 0, "", place.choice)
        trunk, _ = sampler.trunk(place, embedding)
        branches = tuple(sampler.branch(unit, embedding, trunk)[0] for unit in branch_units(config, tree, place))
        scores = np.random.default_rng(0).standard_normal((len(config.rewards), len(tree.leaf))).astype(np.float32)
        share = -(-config.data.prompts_per_iteration // self.config.learner.ranks)
        slots = range(min(config.learner.micro_batch, share))
        return [PromptRollout(0, slot, "", tree, scores, embedding, trunk, branches) for slot in slots]

    def _learner(self, rollouts: list[PromptRollout]) -> dict[int, float]:
        """Seconds of a micro-batch: forward, backward and its share of the optimizer step."""
        from g2rpo_ray.learner.batch import BatchShape, reduce_metrics, spread
        from g2rpo_ray.learner.rendezvous import alone
        from g2rpo_ray.rollout.plan import with_credit_scores

        config, device = _small(self.config), self.config.learner.device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = _memory(device)
        with alone(device):
            from g2rpo_ray.learner.engine import LearnerEngine  # imports DeepSpeed, which reads the environment

            engine = LearnerEngine(config, 0, 1, model=self._random_model(config.model, device))
        shards = spread(with_credit_scores(rollouts, config), 1)
        batch, micro = BatchShape.of(shards, config.learner), config.learner.micro_batch
        updates: list[dict[str, float]] = []
        taken = self._seconds(lambda: updates.append(reduce_metrics([engine.update(shards[0], batch)])), device)
        passes = [size for step in batch.steps for size in pieces(step.states, micro)]
        memory = sum(learner_memory(config, max(passes), config.learner.gradient_checkpointing).values())
        self.found["memory_gib"]["learner"] = (_memory(device) - held) / 2**30, memory / 2**30
        self.found["mismatch_velocity"] = updates[0].get("mismatch/velocity")
        self.found["same_bits"]["learner"] = len({update["learner/grad_norm"] for update in updates}) == 1
        self._say(f"a learner's micro-batch of {max(passes)} states: {taken / len(passes):.4g} s")
        return {max(passes): taken * max(passes) / sum(passes)}

    def _rewards(self) -> dict[str, float]:
        """Seconds of an image by reward, without rewards that cannot run on this machine."""
        config, scores = self.config, {}
        pictures = [Picture("noise", "noise", image) for image in self._noise(PICTURES)]
        served = serving(config.all_rewards)
        for key, reward in config.rewards_by_key.items():
            name = key.partition(".")[2]
            if served[name] != name:
                continue
            try:
                with trial({key: reward}, pictures, config.startup_timeout_s, measured=True) as tried:
                    found = tried()[key]
                scores[name] = 1 / found["per_s"]
                self.found["same_bits"][key] = found["same"]
                self._say(f"{key}: {scores[name]:.4g} s an image")
            except (ValueError, KeyError) as error:
                self._say(f"{key}: not measured, so estimates leave it out: {error}")
        return scores

    def _noise(self, number: int) -> Images:
        """Images or videos of the run's size."""
        model = self.config.model
        frames = [model.frames] if model.frames > 1 else []
        return np.random.default_rng(0).integers(0, 256, (number, *frames, model.height, model.width, 3), np.uint8)


@contextmanager
def fits(keys: str) -> Iterator[None]:
    """Raises ValueError, in one line with the keys of the settings to lower, where the device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{keys}: too large for this device's memory; give less: {one_line(error)}") from None


def _small(config: Config) -> Config:
    """The configuration with fewer edges and states of the same kinds, and a learning rate without effect."""
    sampler = config.sampler
    still: dict[str, Any] = {"learner.lr": 1e-30, "learner.lr_schedule": "constant", "learner.warmup": 0}
    still["learner.velocity_tolerance"] = 1000.0  # reported as `mismatch_velocity`
    fewer: dict[str, Any] = {}
    if sampler.strides != "auto":
        fewer["sampler.strides"] = (max(sampler.strides),)
    if sampler.branch_steps != "auto" and sampler.branch_schedule == "fixed":
        fewer["sampler.branch_steps"] = sampler.branch_steps[-2:]
    with suppress(ValueError):  # the last steps may be untrained
        return with_settings(config, {**still, **fewer})
    return with_settings(config, still)


def _competitors(config: Config, cores: int) -> int:
    """Two actors for each core, since rewards, learner and driver work there, too; fewer if memory is short."""
    each = sum(rollout_memory(config).values()) + LIBRARIES
    fit = int(psutil.virtual_memory().available * MEMORY_SHARE / each)
    return max(1, min(2 * cores // config.rollout.threads, MOST_COMPETITORS, fit))


def _branch(config: Config, random: bool, rollout: PromptRollout) -> Callable[[], Any]:
    """The work of a rollout actor: the prompt's last branch unit."""
    set_up_torch(config.deterministic, config.rollout.threads)
    sampler = Sampler(config, FlowModel.skeleton(config.rollout_model, "cpu") if random else None)
    place = TrunkUnit(0, 0, "", config.sampler.costliest)
    unit = list(branch_units(config, rollout.tree, place))[-1]
    assert rollout.embedding
    assert rollout.trunk
    return partial(sampler.branch, unit, rollout.embedding, rollout.trunk)


def _embedding(config: Config, model: FlowModel) -> PromptEmbedding:
    drawn = model.random_embedding("", torch.Generator().manual_seed(0))
    return drawn if config.model.negative_prompt is None else replace(drawn, negative=drawn)


def _memory(device: str) -> int:
    """Bytes: the peak of allocated GPU memory; on a CPU, the process's current resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
