"""Engines in spawned process groups without Ray, a group for each number of ranks, which works through all its jobs."""

import itertools
import math
import multiprocessing
import pickle
import socket
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch

from g2rpo_ray.algo.growth import grow
from g2rpo_ray.algo.tree import ANCHOR
from g2rpo_ray.config import Config
from g2rpo_ray.learner.batch import BatchShape, reduce_metrics, spread
from g2rpo_ray.learner.rendezvous import serve, set_environment
from g2rpo_ray.models import (
    FlowModel,
    add_lora,
    export_lora,
    lora_state,
)
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import branch_part, branch_units, edge_key, prompt_tree, trunk_part
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import Branches, PromptEmbedding, PromptRollout, StoredTensor, Trunk, TrunkUnit
from tests.support.tiny_flux import POOLED_DIM, TEXT_DIM, write_tiny_flux

STAGES, SCHEDULES, WORLDS = (1, 2, 3), ("per_step", "accumulate"), (1, 2)

SAMPLER = {
    "steps": 6, "shift": 3.0, "kernel": "flow", "eta": 0.7, "roots": 1, "branch_steps": (0, 1, 3), "group_size": 4,
    "stochastic_edges": 1, "strides": (1, 2),
}  # fmt: skip

CREDIT = {"group": "siblings", "spread": "group", "clip": 5.0}

LEARNER = {
    "resources": {"CPU": 1}, "objective": "clip", "schedule": "per_step", "lr": 1e-3,
    "clip_range": 2.4e-5, "grad_clip": 4e-3, "micro_batch": 3,  # a pass under ZeRO-3 takes a third of a second
}  # fmt: skip

WEIGHTS = {"first": 1.0, "second": 0.5}

ITERATION = 2

HUNG_AFTER_S = 5000  # no default of torch or DeepSpeed

NOT_ON_POLICY = 1000  # a second update with the same rollouts

ON_ONE_RANK = [*itertools.product((*SCHEDULES, "kl", "twice"), STAGES)]

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
            "hung_after_s": HUNG_AFTER_S,
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


def with_twins(rollout):
    """The first two children of the first branch unit are one: their noise was the same."""
    first, *others = rollout.branches
    latents = first.latents.copy()
    latents[1] = latents[0]
    return replace(rollout, branches=(replace(first, latents=latents), *others))


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


# Process groups


@dataclass
class Job:
    config: Config
    rollouts: list
    updates: int = 1
    load: str | None = None
    save: str | None = None  # after the updates
    on_policy: bool = True
    stale: bool = False  # a last update with the rollouts of the version before

    def run(self, rank, ranks):
        """(LoRA, metrics of the last update, error)."""
        from g2rpo_ray.learner.engine import LearnerEngine

        engine = LearnerEngine(self.config, rank, ranks, self.load)
        metrics, error = {}, None
        shards = spread(self.rollouts, ranks)
        batch = BatchShape.of(shards, self.config.learner, self.on_policy)
        batches = [batch] * self.updates
        if self.stale:
            batches.append(BatchShape.of(shards, self.config.learner, on_policy=False))
        try:
            for version, batch in enumerate(batches):
                engine.publish(version)
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
    set_environment(rank, ranks, "127.0.0.1", port, "cpu")
    partitioned = watch_initialize()
    results = {name: job.run(rank, ranks) for name, job in jobs.items()}
    results["timeouts"] = {}, timeouts(), None
    results["partitioned"] = {}, partitioned, None
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    results["strict"] = {}, {"strict": torch.are_deterministic_algorithms_enabled() and not warn_only}, None
    (directory / f"{rank}.pickle").write_bytes(pickle.dumps(results))


def timeouts():
    """Seconds after which collectives fail, by number of the process group."""
    backends = [group._get_backend(torch.device("cpu")) for group in torch.distributed.distributed_c10d._world.pg_map]
    return {number: backend.options._timeout.total_seconds() for number, backend in enumerate(backends)}


def watch_initialize():
    """{stage: whether all parameters are partitioned}, as DeepSpeed's `initialize` found them, each time the same."""
    import deepspeed

    found, initialize = {}, deepspeed.initialize

    def watched(*, model, config, **others):
        there = all(getattr(parameter, "ds_tensor", None) is not None for parameter in model.parameters())
        stage = config["zero_optimization"]["stage"]
        assert found.setdefault(stage, there) == there
        return initialize(model=model, config=config, **others)

    deepspeed.initialize = watched
    return found


def run_jobs(ranks, jobs, directory):
    """Rank 0's results, once it is sure that all ranks end with the same bits."""
    directory.mkdir()
    store = serve("127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", store.port))  # it is bound already
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["g2rpo_ray.learner.engine"])  # which takes longer to import than to train
    processes = [context.Process(target=work, args=(rank, ranks, store.port, jobs, directory)) for rank in range(ranks)]
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
def few(request):
    """Whether only tests that are `core` were asked for, as by `make test`: they need the jobs of one rank alone."""
    here = [item for item in request.session.items if item.path == request.path]
    return all(item.get_closest_marker("core") for item in here)


@pytest.fixture(scope="module")
def jobs(few, pipeline, rollouts):
    """What two ranks do, and one rank in part."""

    def job(updates=1, shards=rollouts, model=None, on_policy=True, **learner):
        return Job(settings(pipeline, model=model, **learner), shards, updates, on_policy=on_policy)

    drifted = [
        replace(r, branches=tuple(replace(unit, log_prob=unit.log_prob - 1e-3) for unit in r.branches))
        for r in rollouts
    ]
    found = {
        (schedule, stage): job(
            schedule=schedule, zero_stage=stage, gradient_checkpointing=stage == 3, micro_batch=1 if stage == 1 else 3
        )
        for schedule in SCHEDULES
        for stage in STAGES
    }
    for stage in STAGES:
        found["kl", stage] = job(kl_beta=30, zero_stage=stage, micro_batch=2)
        found["twice", stage] = job(updates=2, zero_stage=stage, velocity_tolerance=NOT_ON_POLICY)
    if few:
        return found
    found["drifted"] = job(shards=drifted, zero_stage=2)
    found["drifted, and used"] = job(shards=drifted, old_log_prob="rollout")
    found["stale"] = job(shards=drifted, on_policy=False, old_log_prob="rollout")
    for stage in STAGES:
        for who in ("learner", "rollout"):
            found["one version old", who, stage] = replace(job(old_log_prob=who, zero_stage=stage), stale=True)
    other = [replace(r, trunk=replace(r.trunk, velocities=1.001 * r.trunk.velocities)) for r in rollouts]
    found["other velocities"] = job(shards=other)
    found["unscored step"] = job(shards=scored(rollouts, lambda start, scores: np.where(start == 1, np.nan, scores)))
    found["equal scores"] = job(
        shards=scored(rollouts, lambda start, scores: np.where((start == 3) & [[True], [False]], 0.5, scores))
    )
    silent = lora_state(policy(settings(pipeline)).transformer)
    quiet = next(name for name in silent if ".lora_A." in name)
    silent[quiet] = 0 * silent[quiet]  # with B = 0 this layer's gradient is 0
    adapter = settings(pipeline).lora
    kind = FlowModel.load(settings(pipeline).model, "cpu").pipeline_class
    export_lora(pipeline.parent / "silent", silent, adapter, kind)
    found["a silent module"] = job(lora_initial=str(pipeline.parent / "silent"), velocity_tolerance=NOT_ON_POLICY)
    found["large eps"] = job(eps=1e-2)
    found["twins"] = job(shards=[with_twins(rollout) for rollout in rollouts])
    found["one prompt"] = job(shards=rollouts[:1], zero_stage=3)
    found["no scores"] = job(shards=scored(rollouts, lambda start, scores: scores * np.nan))
    broken = [replace(r, trunk=replace(r.trunk, latents=r.trunk.latents * np.nan)) for r in rollouts]
    for stage in STAGES:
        found["not finite", stage] = job(shards=broken, zero_stage=stage, on_policy=False, old_log_prob="rollout")
    rounded = settings(pipeline, model={"dtype": "bfloat16"}, zero_stage=3, lr=1e-7)
    for stage in (2, 3):
        fast = settings(pipeline, model={"dtype": "bfloat16"}, zero_stage=stage)
        found["bfloat16", stage] = Job(fast, sample_rollouts(fast, prompts=3))
    found["bfloat16"] = Job(rounded, sample_rollouts(rounded, prompts=3))
    for name, method in METHODS.items():
        sections, prompts = {k: method.get(k) for k in ("sampler", "credit")}, method.get("prompts", 3)
        config = settings(pipeline, **sections, **method.get("learner", {}))
        found[name] = Job(config, sample_rollouts(config, prompts))
    return found


@pytest.fixture(scope="module")
def results(few, jobs, rollouts, tmp_path_factory):
    """{number of ranks: {job: result}}; each group resumes its own checkpoints, one of three ranks those of two."""
    directory = tmp_path_factory.mktemp("learner")
    found = {}
    for ranks in WORLDS:
        names = jobs if ranks > 1 else ON_ONE_RANK
        todo = {name: replace(jobs[name], config=with_ranks(jobs[name].config, ranks)) for name in names}
        for stage in STAGES:
            twice, file = todo["twice", stage], str(directory / f"checkpoint-{ranks}-{stage}")
            todo["first half", stage] = replace(twice, updates=1, save=file)
            todo["second half", stage] = replace(twice, updates=1, load=file)
            todo["untouched", stage] = replace(twice, updates=0, load=file, save=file + "-again")
        found[ranks] = run_jobs(ranks, todo, directory / f"ranks-{ranks}")
    if few:
        return found, directory
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
