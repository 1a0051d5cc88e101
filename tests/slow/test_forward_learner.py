"""The learner on re-noised images: against a plain program, on any ranks and ZeRO stage, exact on resume."""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from g2rpo_ray.learner.batch import BatchShape, reduce_metrics, spread
from g2rpo_ray.models import load_lora, lora_disabled, lora_parameters, lora_state
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import image_key
from tests.support.learner_groups import (
    ITERATION,
    NOT_ON_POLICY,
    Job,
    advantages,
    pipeline,  # noqa: F401  fixtures
    policy,
    run_jobs,
    same,
    sample_rollouts,
    settings,
    with_ranks,
)

STAGES = (1, 2, 3)

FLAT = {"kernel": "ode", "roots": 5, "branch_steps": (0,), "group_size": 1, "strides": (1,)}

STEP = {"group": "step", "spread": "batch"}

BRANCHED = {"branch_steps": (0, 2), "group_size": 3, "strides": (1, 2)}  # images below stochastic steps

AVERAGED = {"old_decay": (1, 0.2, 0.5)}

CASES = {
    "nft": (FLAT, {"objective": "nft", "draws": 2, "kl_beta": 0.1, "nft_beta": 0.5, **AVERAGED, "ema": 0.5}),
    "awm": (FLAT, {"objective": "awm_ghuber", "draws": 2, "updates_per_rollout": 2, "old_kl": 3.0, **AVERAGED}),
    "stale nft": (FLAT, {"objective": "nft", "times": "logit_normal", "micro_batch": 4}),
    "stale awm": (FLAT | {"untrained": (0, 5)}, {"objective": "awm", "draws": 2}),
    "branched": (
        BRANCHED,
        {"objective": "awm_t", "times": "uniform", "schedule": "per_step", "updates_per_rollout": 3},
    ),
}

NAMES = [(name, stage) for name in CASES for stage in (STAGES if name == "nft" else STAGES[:1])]

RESUMED = ("nft", "awm")

ON_RANKS = {1: [(name, 1) for name in RESUMED], 2: NAMES}

UPDATES = 3


@dataclass
class ForwardJob(Job):
    """Updates with the same rollouts, as if each version had sampled them; what is published before each, and `ema`."""

    first: int = 0  # version

    def run(self, rank, ranks):
        from g2rpo_ray.learner.engine import LearnerEngine

        engine = LearnerEngine(self.config, rank, ranks, self.load)
        shards, published, metrics = spread(self.rollouts, ranks), [], {}
        for version in range(self.first, self.first + self.updates):
            published.append(engine.publish(version))
            stale = not self.on_policy and version > 0
            parts = [None] * ranks
            part = engine.update(shards[rank], BatchShape.of(shards, self.config.learner, on_policy=not stale))
            torch.distributed.all_gather_object(parts, part)
            metrics = reduce_metrics(parts)
        published.append(engine.publish(self.first + self.updates))
        if self.save:
            engine.save(self.save)
            torch.distributed.barrier()  # rank 0 writes it, and the next job may read it
        flat = {f"{k} {n}": a for k, state in enumerate(published) for n, a in state.items()}
        flat |= {f"ema {n}": a for n, a in engine.copies.averages.get("ema", {}).items()}
        return engine.lora_state() | flat, metrics, None


@pytest.fixture(scope="module")
def jobs(pipeline):
    found = {}
    base = {"lr": 1e-3, "grad_clip": 1.0, "schedule": "accumulate", "clip_range": 2e-5}
    base["velocity_tolerance"] = NOT_ON_POLICY  # the base sampled for all of them
    for name, stage in NAMES:
        sampler, learner = CASES[name]
        config = settings(pipeline, sampler=sampler, credit=STEP, **(base | learner), zero_stage=stage)
        found[name, stage] = ForwardJob(config, sample_rollouts(config, 3), UPDATES, on_policy="stale" not in name)
    return found


@pytest.fixture(scope="module")
def results(jobs, tmp_path_factory):
    """By number of ranks; of those that are resumed also as one that stops after an update and goes on."""
    directory, found = tmp_path_factory.mktemp("forward"), {}
    for ranks, names in ON_RANKS.items():
        todo = {}
        for name in names:
            job = replace(jobs[name], config=with_ranks(jobs[name].config, ranks))
            file = str(directory / f"{ranks} {name}")
            todo[name] = job
            if name[0] in RESUMED:
                todo["first", name] = replace(job, updates=1, save=file)
                todo["second", name] = replace(job, updates=UPDATES - 1, load=file, first=1)
        found[ranks] = run_jobs(ranks, todo, directory / f"ranks-{ranks}")
    return found


@pytest.mark.parametrize("ranks, name", [(ranks, name) for ranks in ON_RANKS for name in ON_RANKS[ranks]], ids=str)
def test_update_is_that_of_a_plain_program(ranks, name, jobs, reference, results):
    lora, metrics, _ = results[ranks][name]
    expected, expected_metrics = reference(name)
    same(lora, expected, 1e-5)
    for key, value in expected_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=2e-3, abs=1e-6), key
    start = lora_state(policy(jobs[name].config).transformer)
    assert max(np.abs(lora[key] - start[key]).max() for key in start) > 1e-3


@pytest.mark.parametrize("ranks", ON_RANKS)
def test_resume_is_exact(ranks, results):
    for name in [name for name in ON_RANKS[ranks] if name[0] in RESUMED]:
        whole, metrics, _ = results[ranks][name]
        resumed, again, _ = results[ranks]["second", name]
        last = {key: array for key, array in whole.items() if key[0] not in "0123"}
        same({key: resumed[key] for key in last}, last)
        assert metrics == again
        published = {key.split(" ", 1)[1]: array for key, array in whole.items() if key.startswith(f"{UPDATES} ")}
        same({n: resumed[f"{UPDATES - 1} {n}"] for n in published}, published)


@pytest.fixture(scope="module")
def reference(jobs):
    return cache(lambda name: by_hand(jobs[name]))


def by_hand(job):
    """Every update in plain PyTorch, one draw at a time; other policies are whole models."""
    config, learner = job.config, job.config.learner
    model, other, start = policy(config), policy(config), lora_state(policy(config).transformer)
    lora = lora_parameters(model.transformer)
    optimizer = torch.optim.AdamW(lora.values(), lr=learner.lr, eps=learner.eps, weight_decay=learner.weight_decay)
    average, ema, published, steps, found = dict(start), dict(start), [], 0, {}

    def mixed(before, keep):
        return {n: keep * before[n] + (1 - keep) * array for n, array in lora_state(model.transformer).items()}

    for update in range(job.updates):
        published.append(average if learner.average_samples else lora_state(model.transformer))
        old = published[-1] if job.on_policy or update == 0 else published[-2]
        draws = draws_of(config, job.rollouts)
        means = []
        for key in sorted({draw["step"] for draw in draws}):
            parts = [
                draw_loss(config, model, other, draw, {"old": old, "average": average})
                for draw in draws
                if draw["step"] == key
            ]
            loss = torch.stack([part["loss"] for part in parts]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(lora.values()), learner.grad_clip)
            optimizer.step()
            steps += 1
            ema = mixed(ema, min(learner.ema or 0, (1 + steps) / (10 + steps)))
            means.append({name: float(np.mean([part[name].item() for part in parts])) for name in parts[0]})
        if learner.old_decay:
            flat, rate, most = learner.old_decay
            average = mixed(average, min(max(0, (steps - flat) * rate), most))
        found = {f"learner/{name}": float(np.mean([mean[name] for mean in means])) for name in means[0]}
    published.append(average if learner.average_samples else lora_state(model.transformer))
    state = lora_state(model.transformer) | {f"{k} {n}": a for k, s in enumerate(published) for n, a in s.items()}
    return state | ({f"ema {n}": a for n, a in ema.items()} if learner.ema else {}), found


def draws_of(config, rollouts):
    """Of each image that has an advantage each draw: its x0, t, ε, advantage and optimizer step."""
    sampler, learner, found = config.sampler, config.learner, []
    sigmas = np.array([3 * t / (1 + 2 * t) for t in (1 - i / sampler.steps for i in range(sampler.steps + 1))])
    for rollout, advantage in zip(rollouts, advantages(config, rollouts), strict=True):
        tree = rollout.tree
        latents = {n: x for unit in rollout.branches for n, x in zip(unit.nodes, unit.latents, strict=True)}
        images = sorted(latents)
        for draw in range(learner.draws):
            source = generator("level", config.seed, ITERATION, rollout.slot, rollout.prompt, draw)
            order = torch.randperm(len(images), generator=source).tolist()
            jitter = torch.rand(len(images), generator=source, dtype=torch.float64).tolist()
            for at, node in enumerate(images):
                edge = node
                while tree.edge[edge] < 0:
                    edge = tree.parent[edge]
                edge = int(tree.edge[edge])
                if edge not in advantage:
                    continue
                place = (draw + (order[at] + jitter[at]) / len(images)) / learner.draws
                key = image_key(config, rollout, tree, node, draw)
                part = rollout.slot * learner.updates_per_rollout // len(rollouts)
                found.append({
                    "rollout": rollout, "x0": torch.tensor(latents[node])[None], "a": advantage[edge],
                    "t": level(learner.times, place, sigmas, sampler), "key": key,
                    "step": (part, int(tree.start[edge]) if learner.schedule == "per_step" else 0),
                })  # fmt: skip
    return found


def level(times, place, sigmas, sampler):
    if times == "grid":
        left = [sigma for index, sigma in enumerate(sigmas[:-1]) if index not in sampler.untrained]
        return float(left[int(place * len(left))])
    if times == "logit_normal":
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(place, dtype=torch.float64)).item()
        place = 1 / (1 + math.exp(-z))
    return float(np.interp(place * sampler.steps, np.arange(sampler.steps + 1), sigmas))


def draw_loss(config, model, other, draw, states):
    """Of one draw: its loss, and what it adds to each metric."""
    learner, x0, a = config.learner, draw["x0"], draw["a"]
    t = torch.tensor([draw["t"]], dtype=torch.float32)
    noise = model.initial_noise(generator(*draw["key"]))[None]
    x, conditioning = (1 - t) * x0 + t * noise, model.condition([draw["rollout"].embedding])

    @torch.no_grad()
    def by(name):
        load_lora(other.transformer, states[name])
        return other.velocity(x, t, conditioning)

    v, old, average = model.velocity(x, t, conditioning), by("old"), by("average")
    with torch.no_grad(), lora_disabled(other.transformer):
        base = other.velocity(x, t, conditioning)
    found = {"old_shift": ((v - old) ** 2).mean()}
    if learner.objective == "nft":
        r, c, beta, loss = min(max(a / (2 * config.credit.clip) + 0.5, 0), 1), config.credit.clip, learner.nft_beta, 0
        for share, sign in ((r, 1), (1 - r, -1)):
            predicted = x - t * (old + sign * beta * (v - old))
            distance = max((predicted - x0).abs().mean().item(), 1e-5)
            loss = loss + c / beta * share * ((predicted - x0) ** 2).mean() / distance
    else:
        wrong = {"awm": lambda m: m, "awm_t": lambda m: m * t, "awm_ghuber": lambda m: 4 * t * (m**0.25 - 1e-10**0.25)}
        new, before = (-wrong[learner.objective](((w - (noise - x0)) ** 2).mean()) for w in (v, old))
        ratio = torch.exp(new - before).squeeze()
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - learner.clip_range, 1 + learner.clip_range))
        found["ratio_mean"] = ratio
        found["clip_fraction"] = (abs(ratio.item() - 1) > learner.clip_range) * torch.tensor(1.0)
    for name, beta, reference in (("kl", learner.kl_beta, base), ("old_kl", learner.old_kl, average)):
        found[name] = ((v - reference) ** 2).mean() if beta else torch.tensor(0.0)
        loss = loss + beta * found[name]
    return {name: value.detach() for name, value in found.items()} | {"loss": loss}
