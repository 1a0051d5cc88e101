"""The learner against a plain PyTorch program; the same result on any ranks and ZeRO stage; exact resume; Ray.

Engines run in spawned process groups without Ray, one group for each number of ranks, which works through all its jobs.
"""

import asyncio
import itertools
import math
import multiprocessing
import os
import pickle
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from actors.learner import LearnerGroup, LearnerLost
from g2rpo_ray.algo import ANCHOR, grow
from g2rpo_ray.config import Config
from g2rpo_ray.models import (
    FlowModel,
    add_lora,
    describe,
    lora_disabled,
    lora_parameters,
    lora_state,
    read_lora,
    verify,
)
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import branch_part, branch_units, edge_key, prompt_tree, sigma_grid, trunk_part
from g2rpo_ray.types import Branches, PromptEmbedding, PromptRollout, StoredTensor, Trunk, TrunkUnit
from learner.batch import BatchShape, reduce_metrics, spread
from tests.runs import descendants, free_port, title_of
from tests.tiny_flux import POOLED_DIM, TEXT_DIM, write_tiny_flux

STAGES, SCHEDULES, WORLDS = (1, 2, 3), ("per_step", "accumulate"), (1, 2)
SAMPLER = {
    "steps": 6, "shift": 3.0, "kernel": "flow", "eta": 0.7, "roots": 1, "branch_steps": (0, 1, 3), "group_size": 4,
    "stochastic_edges": 1, "strides": (1, 2),
}  # fmt: skip
CREDIT = {"group": "siblings", "spread": "group", "clip": 5.0}
LEARNER = {
    "device": "cpu", "resources": {"CPU": 1}, "objective": "clip", "schedule": "per_step", "lr": 1e-3,
    "clip_range": 2.4e-5, "grad_clip": 4e-3,
}  # fmt: skip
WEIGHTS = {"first": 1.0, "second": 0.5}
ITERATION = 2
NOT_ON_POLICY = 1000  # a second update with the same rollouts

METHODS = {
    "chains": {  # Flow-GRPO
        "sampler": {
            "eta": 0.9, "roots": 3, "branch_steps": (0,), "group_size": 1, "stochastic_edges": 6, "untrained": (5,),
            "strides": (1,),
        },
        "credit": {"group": "step", "spread": "batch"},
        "learner": {"schedule": "accumulate", "updates_per_rollout": 2, "zero_stage": 1},
    },
    "chains that split": {  # BranchGRPO
        "sampler": {
            "kernel": "dance", "eta": 0.3, "branch_steps": (0,), "group_size": 2, "stochastic_edges": 5,
            "splits": (1, 3), "width": 2, "strides": (1,),
        },
        "credit": {"group": "step"},
        "learner": {"schedule": "accumulate", "updates_per_rollout": 3, "micro_batch": 2},
    },
    "sliding window": {  # MixGRPO's window, of which DanceGRPO's draw trains a part
        "sampler": {
            "kernel": "dance", "eta": 0.3, "branch_steps": (0,), "branch_schedule": "slide", "slide_every": 1,
            "stochastic_edges": 4, "trained_share": 0.6, "strides": (1,),
        },
        "credit": {"group": "step"},
    },
    "guard": {"learner": {"objective": "guard"}},
    "guard over chains": {  # the drift of edges whose noise has later numbers in its key
        "sampler": {"branch_steps": (0, 2), "roots": 2, "group_size": 2, "stochastic_edges": 3, "strides": (2,)},
        "credit": {"group": "step"},
        "learner": {"objective": "guard", "clip_range": 2.2e-5},
    },
    "dppo": {"learner": {"objective": "dppo", "schedule": "accumulate", "updates_per_rollout": 3, "lr": 2e-2}},
    "weighted edges": {  # TempFlow-GRPO
        "sampler": {"roots": 2, "group_size": 3},
        "credit": {"spread": "batch", "granularity_weights": (1.0, 0.5), "clip": 1.0},
        "learner": {"edge_weight": 1.73, "schedule": "accumulate", "updates_per_rollout": 2, "kl_beta": 30},
    },
    **{
        ("subpaths", stage): {  # Pave-GRPO, along the long edges of E-GRPO
            "sampler": {"eta": 0.8, "edge_length": 2},
            "learner": {"objective": "reinforce", "subpaths": (2, 3), "zero_stage": stage, "micro_batch": 4},
        }
        for stage in (2, 3)
    },
    **{
        ("drawn branch step", schedule): {  # Flow-GRPO-Fast; from step 3 the third edge is not trained
            "sampler": {
                "kernel": "cps", "eta": 0.8, "roots": 3, "branch_schedule": "draw", "group_size": 1,
                "stochastic_edges": 3, "untrained": (5,), "strides": (1,),
            },
            "credit": {"group": "step", "spread": "batch"},
            "learner": {"schedule": schedule, "clip_range": 2e-5, "zero_stage": 3},
            "prompts": 4,
        }
        for schedule in SCHEDULES
    },
}  # fmt: skip


def settings(pipeline, ranks=1, model=None, lora_rank=3, lora_initial=None, sampler=None, credit=None, **learner):
    return Config.model_validate(
        {
            "name": "test",
            "seed": 3,
            "model": {"path": str(pipeline), "dtype": "float32", "height": 16, "width": 16} | (model or {}),
            "lora": {"rank": lora_rank, "alpha": 6, "initial": lora_initial},
            "sampler": SAMPLER | (sampler or {}),
            "credit": CREDIT | (credit or {}),
            "rollout": {"members_per_unit": 3, "micro_batch": 8},
            "rewards": {name: {"kind": "unused", "weight": weight} for name, weight in WEIGHTS.items()},
            "learner": LEARNER | learner | {"ranks": ranks},
            "data": {"train_prompts": "unused", "heldout_prompts": "unused"},
            "evaluation": {"anchors": True},
        }
    )


def policy(config):
    model = FlowModel.load(config.model, "cpu", transformer=True)
    add_lora(model.transformer, config.lora, config.seed)
    return model


def sample_rollouts(config, prompts, seed=0):
    """Rollouts by the policy at its start, with random scores, two of which are missing where trees are large."""
    model, rng = policy(config), np.random.default_rng(seed)
    return [sample(config, model, slot, rng) for slot in range(prompts)]


@torch.no_grad()
def sample(config, model, slot, rng):
    """The tree of one prompt, grown unit by unit as rollout workers do."""
    shapes = {"pooled_prompt_embeds": (POOLED_DIM,), "prompt_embeds": (5, TEXT_DIM)}
    tensors = {name: StoredTensor("float32", rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    embedding = PromptEmbedding(f"prompt {slot}", tensors)
    unit = TrunkUnit(ITERATION, slot, embedding.prompt)
    tree = prompt_tree(config, ITERATION, slot, embedding.prompt)
    part, roots = trunk_part(tree), range(config.sampler.roots)
    key = ("root", config.seed, ITERATION, slot, embedding.prompt)
    x = torch.stack([model.initial_noise(generator(*key, root)) for root in roots])
    grown_from = partial(
        grow, partial(model.velocity, conditioning=model.condition([embedding])), tree,
        sigmas=sigma_grid(config.sampler, model), micro_batch=config.rollout.micro_batch,
    )  # fmt: skip
    trunk = grown_from(part.nodes, roots, x, keep=part.touched)

    def noise(edges):
        return torch.stack([model.initial_noise(generator(*edge_key(config, unit, tree, edge))) for edge in edges])

    branches = []
    for branch in branch_units(config, tree, unit):
        part = branch_part(tree, branch, config.learner.forward)
        points = np.flatnonzero(np.isin(tree.branch_points, tree.source[part.edges]))
        grown = grown_from(
            part.nodes, tree.branch_points[points].tolist(), trunk.latents[points], v=trunk.velocities[points],
            kernel=config.sampler.kernel, eta=config.sampler.eta, noise=noise, keep=part.touched,
        )  # fmt: skip
        nodes, edges = np.array(part.touched), np.array(part.edges)
        branches.append(Branches(nodes, grown.latents.numpy(), edges, grown.log_prob.numpy()))
    return PromptRollout(
        ITERATION, slot, embedding.prompt, tree, random_scores(tree, slot, rng), embedding,
        Trunk(trunk.latents.numpy(), trunk.velocities.numpy()), tuple(branches),
    )  # fmt: skip


def random_scores(tree, slot, rng):
    """[R, Q]. Those of anchors are far off: they must be in no mean and no spread."""
    scores = rng.standard_normal((len(WEIGHTS), len(tree.leaf))).astype(np.float32)
    scores[:, tree.tag == ANCHOR] += 1000
    leaves = np.flatnonzero(tree.tag != ANCHOR)
    for reward, leaf in ((1, 5), (0, 8 + 2 * slot)):  # of SAMPLER's tree: one at step 0, and one at step 1
        if leaf < len(leaves):
            scores[reward, leaves[leaf]] = np.nan
    return scores


def scored(rollouts, change):
    """The rollouts with other scores: `change` gets the schedule index at which each leaf's subtree starts, and them.

    Anchors have −1.
    """

    def changed(rollout):
        start = np.full(len(rollout.tree.leaf), -1)
        for subtree in rollout.tree.subtrees:
            start[subtree.leaves] = subtree.branch_step
        return replace(rollout, scores=change(start, rollout.scores).astype(np.float32))

    return [changed(rollout) for rollout in rollouts]


# The reference: one process, one edge at a time, torch's own AdamW and clipping, every formula written out.


def by_hand(config, rollouts):
    """An update in plain PyTorch: LoRA, metrics, share of edges whose gradient is cut off, distance to where it is."""
    model, start, learner = policy(config), policy(config), config.learner
    lora = list(lora_parameters(model.transformer).values())
    optimizer = torch.optim.AdamW(lora, lr=learner.lr, weight_decay=learner.weight_decay)
    part = np.concatenate([[k] * len(p) for k, p in enumerate(np.array_split(rollouts, learner.updates_per_rollout))])
    steps = {}
    for rollout, advantage in zip(rollouts, advantages(config, rollouts), strict=True):
        for edge, a in advantage.items():
            step = (part[rollout.slot], rollout.tree.start[edge] if learner.schedule == "per_step" else 0)
            steps.setdefault(step, []).append((rollout, edge, a))
    found, norms, margins = [], [], []
    for step in sorted(steps):
        parts = [edge_loss(config, model, start, *edge) for edge in steps[step]]
        *means, margin = (torch.stack(column) for column in zip(*parts, strict=True))
        loss, *others = (column.mean() for column in means)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(lora, learner.grad_clip)))
        optimizer.step()
        found.append([loss.item(), *(other.item() for other in others)])
        margins.append(margin.min().item())
    loss, kl, ratio, cut = np.mean(found, axis=0)
    metrics = {"actor/loss": loss, "actor/kl": kl, "actor/ratio_mean": ratio, "actor/grad_norm": max(norms)}
    return lora_state(model.transformer), metrics, cut, min(margins)


def advantages(config, rollouts):
    """For each rollout the advantage of each trained edge that has all its values."""
    return [advantages_of(config, rollout, rollouts) for rollout in rollouts]


def advantages_of(config, rollout, rollouts):
    tree, credit = rollout.tree, config.credit
    edges, tags = range(len(tree.source)), range(len(config.sampler.strides))
    above = [edges_above(tree, node) for node in tree.leaf]
    advantage = {edge: 0.0 for edge in edges if tree.trained[edge]}
    for (r, weight), tag in itertools.product(enumerate(WEIGHTS.values()), tags):
        weight = weight * (credit.granularity_weights or [1.0, 1.0])[tag]
        values = []
        for edge in edges:
            below = [q for q in range(len(tree.leaf)) if edge in above[q] and tree.tag[q] == tag]
            values.append(mean([score for score in rollout.scores[r, below] if np.isfinite(score)]))
        everything = [x.scores[r, q] for x in rollouts for q in range(len(x.tree.leaf)) if x.tree.tag[q] != ANCHOR]
        for edge in advantage:
            alike = tree.source if credit.group == "siblings" else tree.start
            group = [values[e] for e in edges if alike[e] == alike[edge] and np.isfinite(values[e])]
            scale = np.nanstd(np.array(everything, np.float64)) + 1e-4
            if credit.spread == "group":
                scale = np.std(group, ddof=1) + 1e-8 if len(group) > 1 else 1e-8
            advantage[edge] += weight * (values[edge] - mean(group)) / scale
    return {edge: float(np.clip(a, -credit.clip, credit.clip)) for edge, a in advantage.items() if np.isfinite(a)}


def edges_above(tree, node):
    found = []
    while node >= 0:
        found.append(tree.edge[node])
        node = tree.parent[node]
    return found


def mean(numbers):
    return sum(map(float, numbers)) / len(numbers) if len(numbers) else math.nan


def edge_loss(config, model, start, rollout, edge, a):
    """Of one edge: loss, KL, ratio, whether the objective cuts its gradient off, and how far it is from that.

    `start` is the old policy.
    """
    sampler, learner, tree = config.sampler, config.learner, rollout.tree
    sigmas = [3 * t / (1 + 2 * t) for t in (1 - i / sampler.steps for i in range(sampler.steps + 1))]
    sigma, end = sigmas[tree.start[edge]], sigmas[tree.end[edge]]
    latents = dict(zip(tree.branch_points, rollout.trunk.latents, strict=True))
    old = {}
    for unit in rollout.branches:
        latents |= dict(zip(unit.nodes, unit.latents, strict=True))
        old |= dict(zip(unit.edges, unit.log_prob, strict=True))
    x, next_x = torch.tensor(latents[tree.source[edge]]), torch.tensor(latents[tree.target[edge]])
    conditioning = model.condition([rollout.embedding])

    def velocity(of, x, sigma):
        return of.velocity(x[None], torch.tensor([sigma], dtype=torch.float32), conditioning)[0]

    def gaussian(v, x=x, sigma=sigma):
        """Mean and std of the step to the edge's end."""
        delta = end - sigma
        if sampler.kernel == "cps":
            std = end * math.sin(sampler.eta * math.pi / 2)
            return (1 - end) * (x - sigma * v) + math.sqrt(end**2 - std**2) * (x + (1 - sigma) * v), std
        g = sampler.eta
        if sampler.kernel == "flow":
            g *= math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        return x + v * delta + g**2 / (2 * sigma) * (x + (1 - sigma) * v) * delta, g * math.sqrt(-delta)

    def log_density(mu, std):
        if sampler.kernel == "cps":
            return -((next_x - mu) ** 2).mean()
        return (-((next_x - mu) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()

    v = velocity(model, x, sigma)
    mu, std = gaussian(v)
    kl = torch.tensor(0.0)
    if learner.kl_beta:
        with torch.no_grad(), lora_disabled(model.transformer):
            reference, _ = gaussian(velocity(model, x, sigma))
        kl = ((mu - reference) ** 2).mean() / (2 * std**2)
    new = log_density(mu, std)
    log_ratio = new - float(old[edge])
    with torch.no_grad():
        old_mu, _ = gaussian(velocity(start, x, sigma))
    drift = ((mu - old_mu) ** 2).mean() / (2 * std**2)
    cut, margin = False, math.inf
    if learner.objective in ("clip", "guard"):
        ratio = torch.exp(std * (log_ratio + drift) if learner.objective == "guard" else log_ratio)
        free, clipped = -a * ratio, -a * torch.clamp(ratio, 1 - learner.clip_range, 1 + learner.clip_range)
        loss, cut = torch.maximum(free, clipped), bool(clipped > free)
        margin = abs(abs(ratio.item() - 1) - learner.clip_range)
        loss = loss / (sigma - end) if learner.objective == "guard" else loss
    elif learner.objective == "dppo":
        ratio = torch.exp(log_ratio)
        cut = bool(drift >= 1e-5) and ((ratio > 1 and a > 0) or (ratio < 1 and a < 0))
        loss = 0 * ratio if cut else -a * ratio
        margin = abs(drift.item() - 1e-5)
    else:
        ratio = torch.exp(log_ratio)
        loss = -a * torch.exp(new - new.detach())
        for parts in learner.subpaths:
            there, speed = x, v
            for k in range(1, parts):
                there = there + (end - sigma) / parts * speed
                between = sigma + k * (end - sigma) / parts
                speed = velocity(model, there, between)
            along = log_density(*gaussian(speed, there, between))
            loss = loss - a * torch.exp(along - along.detach()) / len(learner.subpaths)
    loss = loss * (learner.edge_weight * std if learner.edge_weight else 1) + learner.kl_beta * kl
    return loss, kl.detach(), ratio.detach(), torch.tensor(float(cut)), torch.tensor(margin)


# Process groups


@dataclass
class Job:
    config: Config
    rollouts: list
    updates: int = 1
    load: str | None = None
    save: str | None = None  # after the updates
    on_policy: bool = True

    def run(self, rank, ranks):
        """(LoRA, metrics of the last update, error)."""
        from learner.engine import LearnerEngine

        engine = LearnerEngine(self.config, rank, ranks, self.load)
        metrics, error = {}, None
        shards = spread(self.rollouts, ranks)
        batch = BatchShape.of(shards, self.config.learner, self.on_policy)
        try:
            for _ in range(self.updates):
                parts = [None] * ranks
                part = engine.update(shards[rank], batch)
                torch.distributed.all_gather_object(parts, part)
                metrics = reduce_metrics(parts)
        except RuntimeError as raised:
            error = str(raised)
        if self.save:
            engine.save(self.save)
            torch.distributed.barrier()  # rank 0 writes it, and the next job may read it
        return engine.lora_state(), metrics, error


def work(rank, ranks, port, jobs, directory):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    results = {name: job.run(rank, ranks) for name, job in jobs.items()}
    (directory / f"{rank}.pickle").write_bytes(pickle.dumps(results))


def run_jobs(ranks, jobs, directory):
    """Rank 0's results, once it is sure that all ranks end with the same bits."""
    directory.mkdir()
    port = free_port()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, ranks, port, jobs, directory)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    first, *others = (pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(ranks))
    for other in others:
        for name, (lora, _, error) in other.items():
            assert error == first[name][2]
            same(lora, first[name][0])
    return first


def same(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def rollouts(pipeline):
    return sample_rollouts(settings(pipeline), prompts=3)


@pytest.fixture(scope="module")
def jobs(pipeline, rollouts):
    """What both process groups do."""

    def job(updates=1, shards=rollouts, model=None, on_policy=True, **learner):
        return Job(settings(pipeline, model=model, **learner), shards, updates, on_policy=on_policy)

    drifted = [
        replace(r, branches=tuple(replace(unit, log_prob=unit.log_prob - 1e-3) for unit in r.branches))
        for r in rollouts
    ]
    found = {
        (schedule, stage): job(schedule=schedule, zero_stage=stage, gradient_checkpointing=stage == 3)
        for schedule in SCHEDULES
        for stage in STAGES
    }
    for stage in STAGES:
        found["kl", stage] = job(kl_beta=30, zero_stage=stage, micro_batch=2)
        found["twice", stage] = job(updates=2, zero_stage=stage, ratio_tolerance=NOT_ON_POLICY)
    found["drifted"] = job(shards=drifted)
    found["stale"] = job(shards=drifted, on_policy=False)
    found["unscored step"] = job(shards=scored(rollouts, lambda start, scores: np.where(start == 1, np.nan, scores)))
    found["equal scores"] = job(
        shards=scored(rollouts, lambda start, scores: np.where((start == 3) & [[True], [False]], 0.5, scores))
    )
    found["one prompt"] = job(shards=rollouts[:1], zero_stage=3)
    found["no scores"] = job(shards=scored(rollouts, lambda start, scores: scores * np.nan))
    broken = [replace(r, trunk=replace(r.trunk, latents=r.trunk.latents * np.nan)) for r in rollouts]
    for stage in STAGES:
        found["not finite", stage] = job(shards=broken, zero_stage=stage, on_policy=False)
    found["bfloat16"] = job(model={"dtype": "bfloat16"}, zero_stage=3, lr=1e-7, ratio_tolerance=1.0)
    for name, method in METHODS.items():
        sections, prompts = {k: method.get(k) for k in ("sampler", "credit")}, method.get("prompts", 3)
        config = settings(pipeline, **sections, **method.get("learner", {}))
        found[name] = Job(config, sample_rollouts(config, prompts))
    return found


@pytest.fixture(scope="module")
def reference(jobs):
    """What a job comes to by hand."""
    return cache(lambda name: by_hand(jobs[name].config, jobs[name].rollouts))


@pytest.fixture(scope="module")
def results(jobs, rollouts, tmp_path_factory):
    """{number of ranks: {job: result}}; each group resumes its own checkpoints, one of three ranks those of two."""
    directory = tmp_path_factory.mktemp("learner")
    found = {}
    for ranks in WORLDS:
        todo = {name: replace(job, config=with_ranks(job.config, ranks)) for name, job in jobs.items()}
        for stage in STAGES:
            twice, file = todo["twice", stage], str(directory / f"checkpoint-{ranks}-{stage}")
            todo["first half", stage] = replace(twice, updates=1, save=file)
            todo["second half", stage] = replace(twice, updates=1, load=file)
            todo["untouched", stage] = replace(twice, updates=0, load=file, save=file + "-again")
        found[ranks] = run_jobs(ranks, todo, directory / f"ranks-{ranks}")
    moved = {
        ("moved", stage): Job(
            with_ranks(jobs["twice", stage].config, 3), rollouts, load=str(directory / f"checkpoint-2-{stage % 3 + 1}")
        )
        for stage in STAGES
    }
    found[3] = run_jobs(3, moved, directory / "ranks-3")  # three do not divide the parameters
    return found, directory


def with_ranks(config, ranks):
    return config.model_copy(update={"learner": config.learner.model_copy(update={"ranks": ranks})})


def is_that_of_a_plain_program(name, result, jobs, expected):
    lora, metrics, error = result
    expected_lora, expected_metrics, _, margin = expected
    assert error is None
    assert margin > 4e-7  # rounding decides of no edge whether it is clipped
    same(lora, expected_lora, 1e-5)
    start = lora_state(policy(jobs[name].config).transformer)
    assert max(np.abs(lora[key] - start[key]).max() for key in lora) > 5e-4  # it went somewhere
    for key, value in expected_metrics.items():
        close = {"abs": 1e-12, "rel": 1e-3} if key == "actor/kl" else {"abs": 1e-5, "rel": 1e-4}
        assert metrics[key] == pytest.approx(value, **close), key


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [*SCHEDULES, "kl"])
def test_update_is_that_of_a_plain_program(kind, stage, ranks, jobs, reference, results):
    is_that_of_a_plain_program((kind, stage), results[0][ranks][kind, stage], jobs, reference((kind, 1)))


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("name", METHODS, ids=str)
def test_update_of_other_trees_and_objectives_is_that_of_a_plain_program(name, ranks, jobs, reference, results):
    is_that_of_a_plain_program(name, results[0][ranks][name], jobs, reference(name))


@pytest.mark.parametrize("name", [("per_step", 1), *METHODS], ids=str)
def test_every_objective_cuts_off_some_edges_and_not_all(name, jobs, reference):
    cut = reference(name)[2]
    one_step = jobs[name].config.learner.objective == "reinforce" or name == ("drawn branch step", "accumulate")
    assert cut == 0 if one_step else 0 < cut < 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_drawn_trees_give_ranks_unequal_numbers_of_states(schedule, jobs):
    job = jobs["drawn branch step", schedule]
    trees = [rollout.tree for rollout in job.rollouts]
    assert len({tuple(tree.start) for tree in trees}) > 1
    assert len({len(tree.states) for tree in trees}) > 1
    counts = [Counter() for _ in range(2)]
    for shard, count in zip(spread(job.rollouts, 2), counts, strict=True):
        count.update(start for r in shard for start in r.tree.index[r.tree.states])
    batch = BatchShape.of(spread(job.rollouts, 2), job.config.learner)
    if schedule == "accumulate":
        assert counts[0].total() != counts[1].total()
        assert [step.states for step in batch.steps] == [max(count.total() for count in counts)]
    else:
        starts = sorted(counts[0] | counts[1])
        assert any(not all(count[start] for count in counts) for start in starts)  # a rank has none of its own
        assert [step.states for step in batch.steps] == [max(count[start] for count in counts) for start in starts]


@pytest.mark.parametrize("ranks", WORLDS)
def test_metrics(ranks, jobs, results):
    job, metrics = jobs["per_step", 2], results[0][ranks]["per_step", 2][1]
    advantage = np.array([a for of_prompt in advantages(job.config, job.rollouts) for a in of_prompt.values()])
    assert metrics["advantage/mean"] == pytest.approx(advantage.mean(), abs=1e-6)
    assert metrics["advantage/std"] == pytest.approx(advantage.std(), rel=1e-6)
    assert metrics["advantage/abs_max"] == pytest.approx(np.abs(advantage).max())
    assert metrics["advantage/zero_std_groups"] == 0
    assert metrics["actor/lr"] == 1e-3
    assert metrics["actor/ratio_max_dev_step/0"] == metrics["actor/ratio_initial_max_dev"]
    assert metrics["actor/ratio_max_dev"] == max(metrics[f"actor/ratio_max_dev_step/{k}"] for k in range(3)) > 1e-6
    assert metrics["actor/ratio_mean"] == pytest.approx(1, abs=metrics["actor/ratio_max_dev"])
    assert 0 < metrics["actor/clip_fraction"] < 1
    assert metrics["actor/grad_norm"] > job.config.learner.grad_clip  # both kinds of clipping at work


def test_first_ratio_is_one(results):
    for ranks in WORLDS:
        done = results[0][ranks]
        for name in [*itertools.product((*SCHEDULES, "kl"), STAGES), *METHODS]:
            assert done[name][1]["actor/ratio_initial_max_dev"] <= 1e-6, name


@pytest.mark.parametrize("ranks", WORLDS)
def test_drifted_log_probs_stop_before_any_step(ranks, jobs, results):
    lora, _, error = results[0][ranks]["drifted"]
    assert "learner.ratio_tolerance" in error
    assert "\n" not in error
    same(
        lora,
        lora_state(policy(jobs["drifted"].config).transformer),
    )


@pytest.mark.parametrize("ranks", WORLDS)
def test_log_probs_of_older_weights_are_allowed_where_they_are_expected(ranks, jobs, reference, results):
    is_that_of_a_plain_program("stale", results[0][ranks]["stale"], jobs, reference("stale"))


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops(stage, ranks, jobs, results):
    lora, _, error = results[0][ranks]["not finite", stage]
    assert "gradient is not finite" in error
    same(lora, lora_state(policy(jobs["not finite", stage].config).transformer))


@pytest.mark.parametrize("ranks", WORLDS)
def test_missing_scores(ranks, reference, results):
    for name in ("unscored step", "one prompt"):
        lora, metrics, _ = results[0][ranks][name]
        expected, expected_metrics, *_ = reference(name)
        same(lora, expected, 1e-5)
        assert metrics["actor/loss"] == pytest.approx(expected_metrics["actor/loss"], abs=1e-5)
    assert "no edge of any tree" in results[0][ranks]["no scores"][2]


@pytest.mark.parametrize("ranks", WORLDS)
def test_groups_of_equal_scores_are_counted(ranks, jobs, reference, results):
    is_that_of_a_plain_program("equal scores", results[0][ranks]["equal scores"], jobs, reference("equal scores"))
    prompts, granularities = 3, 2
    assert results[0][ranks]["equal scores"][1]["advantage/zero_std_groups"] == prompts * granularities


@pytest.mark.parametrize("ranks", WORLDS)
def test_a_bfloat16_base_has_a_float32_lora(ranks, jobs, results):
    lora, _, error = results[0][ranks]["bfloat16"]
    assert error is None
    start = lora_state(policy(jobs["bfloat16"].config).transformer)
    moved = np.concatenate([(lora[name] - start[name]).ravel() for name in lora])
    assert all(array.dtype == np.float32 for array in lora.values())
    assert 0.5e-7 < np.abs(moved[moved != 0]).mean() < 4e-7  # three steps of 1e-7, lost if it were bfloat16


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(stage, ranks, results):
    done, directory = results
    same(done[ranks]["second half", stage][0], done[ranks]["twice", stage][0])
    assert done[ranks]["second half", stage][1] == done[ranks]["twice", stage][1]
    same(done[ranks]["untouched", stage][0], done[ranks]["first half", stage][0])
    files = [directory / f"checkpoint-{ranks}-{stage}{end}" / "learner.safetensors" for end in ("", "-again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_resume_on_other_ranks_and_stage(stage, results):
    same(results[0][3]["moved", stage][0], results[0][1]["twice", stage % 3 + 1][0], 1e-6)


@pytest.mark.parametrize("damage", ["missing", "foreign", "truncated", "other rank"])
def test_foreign_checkpoint(damage, results, jobs, tmp_path):
    from learner.engine import _read_checkpoint

    good, file = results[1] / "checkpoint-1-1" / "learner.safetensors", tmp_path / "learner.safetensors"
    config = jobs["per_step", 1].config
    if damage == "foreign":
        save_file(load_file(good), file)
    elif damage == "truncated":
        file.write_bytes(good.read_bytes()[:-100])
    elif damage == "other rank":
        file, config = good, config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 2})})
    with pytest.raises(ValueError, match=r"^checkpoint .*learner.safetensors: [^\n]*$"):
        _read_checkpoint(file, lora_parameters(policy(config).transformer))


# Ray


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


def by_reference(rollout):
    return replace(
        rollout,
        embedding=ray.put(rollout.embedding),
        trunk=ray.put(rollout.trunk),
        branches=tuple(ray.put(unit) for unit in rollout.branches),
    )


def with_group(config, body):
    """What `body` does with a learner of this configuration; what it raises."""

    async def main():
        async with asyncio.TaskGroup() as tasks:
            group = LearnerGroup(config, tasks)
            try:
                return await body(group)
            finally:
                group.shutdown()

    try:
        return asyncio.run(main())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@pytest.mark.cluster
def test_group(cluster, pipeline, rollouts, results, tmp_path):
    async def learn(group):
        await group.start(120)
        metrics = await group.update([by_reference(rollout) for rollout in rollouts])
        published = await group.publish(1)
        files = await group.save(Folder(tmp_path / "checkpoint"))
        assert files == Folder(tmp_path / "checkpoint").digests()
        return metrics, *published

    async def publish_again(group, checkpoint):
        await group.start(120, checkpoint)
        return (await group.publish(2))[0]

    metrics, manifest, ref = with_group(settings(pipeline, ranks=2, zero_stage=3), learn)
    verify(ray.get(ref), manifest)
    lora, expected, _ = results[0][2]["per_step", 3]
    assert manifest == describe(lora, 1)  # bit for bit what the ranks without Ray compute
    assert metrics == expected
    adapter = tmp_path / "checkpoint" / "lora"
    same(read_lora(adapter), lora)
    from_adapter = settings(pipeline, lora_initial=str(adapter))
    for start, config in ((Folder(tmp_path / "checkpoint"), settings(pipeline)), (None, from_adapter)):
        assert with_group(config, partial(publish_again, checkpoint=start)) == describe(lora, 2)


@pytest.mark.cluster
def test_group_that_cannot_start(cluster, pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"learner\.safetensors: cannot be read"):
        with_group(settings(pipeline), lambda group: group.start(120, tmp_path))
    with pytest.raises(TimeoutError, match=r"learner\.resources"):
        with_group(settings(pipeline, resources={"CPU": 1, "nowhere": 1}), lambda group: group.start(1))


class Bomb:
    """Ends the process that fetches it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.cluster
def test_death_of_a_rank(cluster, pipeline, rollouts):
    async def die(group):
        await group.start(120)
        published = await group.publish(0)
        deadly = replace(by_reference(rollouts[1]), trunk=ray.put(Bomb()))
        start = time.monotonic()
        with pytest.raises(LearnerLost):  # whatever rank 0's collective made of it
            await group.update([by_reference(rollouts[0]), deadly])
        assert time.monotonic() - start < 40
        return published

    # the LoRA is too large to travel in the answer itself
    manifest, ref = with_group(settings(pipeline, ranks=2, lora_rank=128), die)
    assert manifest.bytes > 100 * 1024
    verify(ray.get(ref), manifest)  # what was published outlives the learner


@pytest.mark.cluster
def test_a_rank_that_stands_still_in_its_start_is_lost_and_starts_again(cluster, pipeline):
    """Once it is known what a start takes: the first one has `startup_timeout_s`."""

    async def stop_a_rank():
        while not (found := [child for child in descendants() if "ray::LearnerRank" in title_of(child)]):
            await asyncio.sleep(0.05)
        found[0].suspend()

    async def body(group):
        await group.start(120)
        group.shutdown()
        while any("ray::LearnerRank" in title_of(child) for child in descendants()):
            await asyncio.sleep(0.1)
        _, failed = await asyncio.gather(stop_a_rank(), group.start(120), return_exceptions=True)
        await group.start(120)
        return failed, (await group.publish(0))[0].version

    failed, version = with_group(settings(pipeline).model_copy(update={"startup_timeout_s": 20}), body)
    assert isinstance(failed, LearnerLost)
    assert version == 0
    assert re.fullmatch(r"its ranks are taken for hung: not ready 2\d s after .*; others took \d+ s", str(failed))
