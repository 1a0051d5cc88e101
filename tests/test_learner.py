"""The learner against a plain PyTorch program; the same result on any ranks and ZeRO stage; exact resume; Ray.

Engines run in spawned process groups without Ray, one group for each number of ranks, which works through all its jobs.
"""

import asyncio
import math
import multiprocessing
import os
import pickle
import socket
import time
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from g2rpo_ray.algo import integrate_advantages, run_anchor, shifted_sigmas, transition
from g2rpo_ray.config import Config
from g2rpo_ray.models import (
    FluxModel,
    add_lora,
    describe,
    lora_disabled,
    lora_parameters,
    lora_state,
    read_lora,
    verify,
)
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import Anchor, Branches, PromptEmbedding, PromptRollout
from learner.batch import BatchShape, reduce_metrics, spread
from learner.group import LearnerGroup, LearnerLost
from tests.tiny_flux import POOLED_DIM, TEXT_DIM, write_tiny_flux

STAGES, SCHEDULES, WORLDS = (1, 2, 3), ("per_step", "accumulate"), (1, 2)
SAMPLER = {"steps": 6, "branch_steps": (0, 1, 3), "strides": (1, 2), "group_size": 4, "eta": 0.7}
WEIGHTS = {"first": 1.0, "second": 0.5}
NOT_ON_POLICY = 1e9  # a second update with the same rollouts


def settings(pipeline, ranks=1, model=None, lora_rank=3, lora_initial=None, **learner):
    learner = {"device": "cpu", "resources": {"CPU": 1}, "lr": 1e-3, "clip_range": 2e-5, "grad_clip": 4e-3} | learner
    return Config.model_validate(
        {
            "name": "test",
            "seed": 3,
            "model": {"path": str(pipeline), "dtype": "float32", "height": 16, "width": 16} | (model or {}),
            "lora": {"rank": lora_rank, "alpha": 6, "initial": lora_initial},
            "sampler": SAMPLER,
            "rewards": {name: {"kind": "unused", "weight": weight} for name, weight in WEIGHTS.items()},
            "learner": learner | {"ranks": ranks},
            "data": {"train_prompts": "unused", "heldout_prompts": "unused"},
        }
    )


def policy(config):
    model = FluxModel.load(config.model, "cpu", transformer=True)
    add_lora(model.transformer, config.lora, config.seed)
    return model


def sample_rollouts(config, prompts, seed=0):
    """Rollouts by the policy at its start, with random rewards: a missing score at step 0, and one at step 1."""
    model, rng = policy(config), np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    sigmas = shifted_sigmas(SAMPLER["steps"], config.sampler.shift)
    rollouts = []
    for slot in range(prompts):
        pooled, sequence = (rng.standard_normal(shape, np.float32) for shape in [(POOLED_DIM,), (5, TEXT_DIM)])
        embedding = PromptEmbedding(f"prompt {slot}", pooled, sequence, "float32")
        conditioning = model.condition([embedding])
        x = torch.randn(1, *model.latent_shape, generator=generator)
        with torch.no_grad():
            velocity = partial(model.velocity, conditioning=conditioning)
            anchor = run_anchor(velocity, x, sigmas, SAMPLER["branch_steps"])
        branches = []
        for m, index in enumerate(SAMPLER["branch_steps"]):
            noise = torch.randn(SAMPLER["group_size"], *model.latent_shape, generator=generator)
            step = transition("flow", anchor.latents[m], anchor.velocities[m], sigmas, index, 0.7, noise=noise)
            units = zip(step.next_x.split([3, 1]), step.log_prob.split([3, 1]), strict=True)  # two units a step
            branches.append(tuple(Branches(next_x.numpy(), log_prob.numpy()) for next_x, log_prob in units))
        rewards = rng.standard_normal((2, 3, 2, SAMPLER["group_size"])).astype(np.float32)
        rewards[1, 0, 1, 2] = np.nan
        rewards[0, 1, 0, slot] = np.nan
        arrays = Anchor(anchor.latents[:, 0].numpy(), anchor.velocities[:, 0].numpy())
        rollouts.append(PromptRollout(slot, embedding.prompt, rewards, embedding, arrays, tuple(branches)))
    return rollouts


# The reference: one process, one state at a time, torch's own AdamW and clipping, every formula written out.


def by_hand(config, rollouts):
    """(LoRA, metrics) after an update by a plain PyTorch program."""
    model, learner = policy(config), config.learner
    lora = list(lora_parameters(model.transformer).values())
    optimizer = torch.optim.AdamW(lora, lr=learner.lr, weight_decay=learner.weight_decay)
    steps = range(len(SAMPLER["branch_steps"]))
    losses, norms, kls = [], [], []
    for window in [[m] for m in steps] if learner.schedule == "per_step" else [steps]:
        parts = [part for rollout in rollouts for m in window for part in member_losses(model, rollout, m, learner)]
        if not parts:
            continue
        loss, kl = (torch.stack(column).mean() for column in zip(*parts, strict=True))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(lora, learner.grad_clip)))
        optimizer.step()
        losses.append(loss.item())
        kls.append(kl.item())
    metrics = {"actor/loss": np.mean(losses), "actor/grad_norm": max(norms), "actor/kl": np.mean(kls)}
    return lora_state(model.transformer), metrics


def member_losses(model, rollout, m, learner):
    index = SAMPLER["branch_steps"][m]
    sigmas = [3 * t / (1 + 2 * t) for t in (1 - i / SAMPLER["steps"] for i in range(SAMPLER["steps"] + 1))]
    sigma, delta = sigmas[index], sigmas[index + 1] - sigmas[index]
    g = 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if index == 0 else sigma)))
    std = g * math.sqrt(-delta)
    x = torch.tensor(rollout.anchor.latents[m])
    conditioning = model.condition([rollout.embedding])

    def mean():
        v = model.velocity(x[None], torch.tensor([sigma], dtype=torch.float32), conditioning)[0]
        return x + v * delta + g**2 / (2 * sigma) * (x + (1 - sigma) * v) * delta

    mu, kl = mean(), torch.tensor(0.0)
    if learner.kl_beta:
        with torch.no_grad(), lora_disabled(model.transformer):
            reference = mean()
        kl = ((mu - reference) ** 2).mean() / (2 * std**2)
    next_x = torch.tensor(np.concatenate([unit.next_latents for unit in rollout.branches[m]]))
    old = torch.tensor(np.concatenate([unit.log_prob for unit in rollout.branches[m]]))
    rewards = rollout.rewards[:, m].astype(np.float64)  # [R, J, G]
    members = np.flatnonzero(np.isfinite(rewards).all((0, 1)))
    if not len(members):
        return []
    advantage = np.zeros(SAMPLER["group_size"])
    for r, weight in enumerate(WEIGHTS.values()):
        for scores in rewards[r]:
            advantage += weight * (scores - np.nanmean(scores)) / (np.nanstd(scores, ddof=1) + 1e-8)
    losses = []
    for member in members:
        density = -((next_x[member] - mu) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        ratio = torch.exp(density.mean() - old[member])
        a = float(np.clip(advantage[member], -5, 5))
        clipped = torch.clamp(ratio, 1 - learner.clip_range, 1 + learner.clip_range)
        losses.append((torch.maximum(-a * ratio, -a * clipped) + learner.kl_beta * kl, kl.detach()))
    return losses


# Process groups


@dataclass
class Job:
    config: Config
    rollouts: list
    updates: int = 1
    load: str | None = None
    save: str | None = None  # after the updates

    def run(self, rank, ranks):
        """(LoRA, metrics of the last update, error)."""
        from learner.engine import LearnerEngine

        engine = LearnerEngine(self.config, rank, ranks, self.load)
        metrics, error = {}, None
        shard, batch = spread(self.rollouts, ranks)[rank], BatchShape.of(self.rollouts)
        try:
            for _ in range(self.updates):
                parts = [None] * ranks
                part = engine.update(shard, batch)
                torch.distributed.all_gather_object(parts, part)
                metrics = reduce_metrics(parts)
        except RuntimeError as raised:
            error = str(raised)
        if self.save:
            engine.save(self.save)
        return engine.lora_state(), metrics, error


def work(rank, ranks, port, jobs, directory):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    results = {name: job.run(rank, ranks) for name, job in jobs.items()}
    (directory / f"{rank}.pickle").write_bytes(pickle.dumps(results))


def run_jobs(ranks, jobs, directory):
    """Rank 0's results, once it is sure that all ranks end with the same bits."""
    directory.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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

    def job(updates=1, shards=rollouts, model=None, **learner):
        return Job(settings(pipeline, model=model, **learner), shards, updates)

    drifted = [
        replace(r, branches=tuple(tuple(replace(u, log_prob=u.log_prob - 1e-3) for u in units) for units in r.branches))
        for r in rollouts
    ]
    unscored = [replace(r, rewards=np.where(np.arange(3)[:, None, None] == 1, np.nan, r.rewards)) for r in rollouts]
    found = {
        (schedule, stage): job(schedule=schedule, zero_stage=stage, gradient_checkpointing=stage == 3)
        for schedule in SCHEDULES
        for stage in STAGES
    }
    for stage in STAGES:
        found["kl", stage] = job(kl_beta=0.3, zero_stage=stage, micro_batch=2)
        found["twice", stage] = job(updates=2, zero_stage=stage, ratio_tolerance=NOT_ON_POLICY)
    found["drifted"] = job(shards=drifted)
    found["unscored step"] = job(shards=unscored)
    found["one prompt"] = job(shards=rollouts[:1], zero_stage=3)
    found["no scores"] = job(shards=[replace(r, rewards=np.full_like(r.rewards, np.nan)) for r in rollouts])
    broken = [replace(r, anchor=replace(r.anchor, latents=r.anchor.latents * np.nan)) for r in rollouts]
    for stage in STAGES:
        found["not finite", stage] = job(shards=broken, zero_stage=stage, ratio_tolerance=math.inf)
    found["bfloat16"] = job(model={"dtype": "bfloat16"}, zero_stage=3, lr=1e-7, ratio_tolerance=1.0)
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


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [*SCHEDULES, "kl"])
def test_update_is_that_of_a_plain_program(kind, stage, ranks, jobs, reference, results):
    lora, metrics, error = results[0][ranks][kind, stage]
    expected, expected_metrics = reference((kind, 1))
    assert error is None
    same(lora, expected, 1e-5)
    start = lora_state(policy(jobs[kind, stage].config).transformer)
    assert max(np.abs(lora[name] - start[name]).max() for name in lora) > 5e-4  # it went somewhere
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name


@pytest.mark.parametrize("ranks", WORLDS)
def test_metrics(ranks, jobs, rollouts, results):
    metrics = results[0][ranks]["per_step", 2][1]
    valid = np.stack([np.isfinite(r.rewards).all((0, 2)) for r in rollouts])
    weights = list(WEIGHTS.values())
    advantage = np.stack([integrate_advantages(torch.tensor(r.rewards), reward_weights=weights) for r in rollouts])[
        valid
    ]
    assert metrics["advantage/mean"] == pytest.approx(advantage.mean(), abs=1e-6)
    assert metrics["advantage/std"] == pytest.approx(advantage.std(), rel=1e-6)
    assert metrics["advantage/abs_max"] == pytest.approx(np.abs(advantage).max())
    assert metrics["advantage/zero_std_groups"] == 0
    assert metrics["actor/lr"] == 1e-3
    assert metrics["actor/ratio_max_dev_step/0"] == metrics["actor/ratio_initial_max_dev"]
    assert metrics["actor/ratio_max_dev"] == max(metrics[f"actor/ratio_max_dev_step/{k}"] for k in range(3)) > 1e-6
    assert metrics["actor/ratio_mean"] == pytest.approx(1, abs=metrics["actor/ratio_max_dev"])
    assert 0 < metrics["actor/clip_fraction"] < 1
    assert metrics["actor/grad_norm"] > jobs["per_step", 2].config.learner.grad_clip  # both kinds of clipping at work


def test_first_ratio_is_one(results):
    for ranks in WORLDS:
        done = results[0][ranks]
        for kind in (*SCHEDULES, "kl"):
            for stage in STAGES:
                assert done[kind, stage][1]["actor/ratio_initial_max_dev"] <= 1e-6


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
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops(stage, ranks, jobs, results):
    lora, _, error = results[0][ranks]["not finite", stage]
    assert "gradient is not finite" in error
    same(lora, lora_state(policy(jobs["not finite", stage].config).transformer))


@pytest.mark.parametrize("ranks", WORLDS)
def test_missing_scores(ranks, reference, results):
    for name in ("unscored step", "one prompt"):
        lora, metrics, _ = results[0][ranks][name]
        expected, expected_metrics = reference(name)
        same(lora, expected, 1e-5)
        assert metrics["actor/loss"] == pytest.approx(expected_metrics["actor/loss"], abs=1e-5)
    assert "no member of any group" in results[0][ranks]["no scores"][2]


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
        anchor=ray.put(rollout.anchor),
        branches=tuple(tuple(ray.put(unit) for unit in units) for units in rollout.branches),
    )


@pytest.mark.cluster
def test_group(cluster, pipeline, rollouts, results, tmp_path):
    async def learn():
        group = LearnerGroup(settings(pipeline, ranks=2, zero_stage=3))
        await group.start(120)
        metrics = await group.update([by_reference(rollout) for rollout in rollouts])
        published = await group.publish(1)
        files = await group.save(Folder(tmp_path / "checkpoint"))
        assert files == Folder(tmp_path / "checkpoint").digests()
        group.shutdown()
        return metrics, *published

    async def publish_again(checkpoint, config):
        group = LearnerGroup(config)
        await group.start(120, checkpoint)
        manifest, _ = await group.publish(2)
        group.shutdown()
        return manifest

    metrics, manifest, ref = asyncio.run(learn())
    verify(ray.get(ref), manifest)
    lora, expected, _ = results[0][2]["per_step", 3]
    assert manifest == describe(lora, 1)  # bit for bit what the ranks without Ray compute
    assert metrics == expected
    adapter = tmp_path / "checkpoint" / "lora"
    same(read_lora(adapter), lora)
    from_adapter = settings(pipeline, lora_initial=str(adapter))
    for start in ((Folder(tmp_path / "checkpoint"), settings(pipeline)), (None, from_adapter)):
        assert asyncio.run(publish_again(*start)) == describe(lora, 2)


@pytest.mark.cluster
def test_group_that_cannot_start(cluster, pipeline, tmp_path):
    group = LearnerGroup(settings(pipeline))
    with pytest.raises(ValueError, match=r"learner\.safetensors: cannot be read"):
        asyncio.run(group.start(120, tmp_path))
    group.shutdown()
    group = LearnerGroup(settings(pipeline, resources={"CPU": 1, "nowhere": 1}))
    with pytest.raises(TimeoutError, match=r"learner\.resources"):
        asyncio.run(group.start(1))
    group.shutdown()


class Bomb:
    """Ends the process that fetches it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.cluster
def test_death_of_a_rank(cluster, pipeline, rollouts):
    async def die():
        group = LearnerGroup(settings(pipeline, ranks=2, lora_rank=128))  # too large to travel in the answer itself
        await group.start(120)
        published = await group.publish(0)
        deadly = replace(by_reference(rollouts[1]), anchor=ray.put(Bomb()))
        start = time.monotonic()
        with pytest.raises(LearnerLost):  # whatever rank 0's collective made of it
            await group.update([by_reference(rollouts[0]), deadly])
        assert time.monotonic() - start < 40
        group.shutdown()
        return published

    manifest, ref = asyncio.run(die())
    assert manifest.bytes > 100 * 1024
    verify(ray.get(ref), manifest)  # what was published outlives the learner
