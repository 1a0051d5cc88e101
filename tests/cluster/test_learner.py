"""The learner against a plain PyTorch program; the same result on any ranks and ZeRO stage; exact resume; Ray.

Engines run in spawned process groups without Ray, one group for each number of ranks, which works through all its jobs.
"""

import asyncio
import itertools
import math
import os
import re
import time
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from g2rpo_ray.actors.workers.learner import LearnerGroup, LearnerLost
from g2rpo_ray.learner.batch import BatchShape, spread
from g2rpo_ray.models import (
    lora_disabled,
    lora_parameters,
    lora_state,
    manifest_of,
    read_lora,
    verify,
)
from g2rpo_ray.runs.storage import Folder
from tests.support.learner_groups import (  # noqa: F401  fixtures
    HUNG_AFTER_S,
    METHODS,
    SCHEDULES,
    STAGES,
    WORLDS,
    advantages,
    few,
    jobs,
    pipeline,
    policy,
    results,
    rollouts,
    same,
    settings,
    timeouts,
)
from tests.support.runs import descendants, title_of

# all groups work through their jobs before the first test
pytestmark = pytest.mark.timeout(1500)


# The reference: one process, one edge at a time, torch's own AdamW and clipping, every formula written out.


def by_hand(config, rollouts):
    """An update in plain PyTorch: LoRA, metrics, share of edges whose gradient is cut off, distance to where it is."""
    model, start, learner = policy(config), policy(config), config.learner
    lora = list(lora_parameters(model.transformer).values())
    optimizer = torch.optim.AdamW(lora, lr=learner.lr, eps=learner.eps, weight_decay=learner.weight_decay)
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
    metrics = {"learner/loss": loss, "learner/kl": kl, "learner/ratio_mean": ratio, "learner/grad_norm": max(norms)}
    return lora_state(model.transformer), metrics, cut, min(margins)


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


@pytest.fixture(scope="module")
def reference(jobs):
    """What a job comes to by hand."""
    return cache(lambda name: by_hand(jobs[name].config, jobs[name].rollouts))


def is_that_of_a_plain_program(name, result, jobs, expected):
    lora, metrics, error = result
    expected_lora, expected_metrics, _, margin = expected
    assert error is None
    assert margin > 4e-7  # rounding decides of no edge whether it is clipped
    same(lora, expected_lora, 1e-5)
    start = lora_state(policy(jobs[name].config).transformer)
    assert max(np.abs(lora[key] - start[key]).max() for key in lora) > 5e-4  # it went somewhere
    for key, value in expected_metrics.items():
        close = {"abs": 1e-12, "rel": 1e-3} if key == "learner/kl" else {"abs": 1e-5, "rel": 1e-4}
        assert metrics[key] == pytest.approx(value, **close), key


@pytest.mark.core
@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [*SCHEDULES, "kl"])
def test_update_is_that_of_a_plain_program(kind, stage, ranks, jobs, reference, results):
    is_that_of_a_plain_program((kind, stage), results[0][ranks][kind, stage], jobs, reference((kind, 1)))


@pytest.mark.parametrize("name", METHODS, ids=str)
def test_update_of_other_trees_and_objectives_is_that_of_a_plain_program(name, jobs, reference, results):
    is_that_of_a_plain_program(name, results[0][2][name], jobs, reference(name))


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
    assert metrics["learner/lr"] == 1e-3
    assert metrics["learner/ratio_max_dev_step/0"] == metrics["learner/ratio_initial_max_dev"]
    assert metrics["learner/ratio_max_dev"] == max(metrics[f"learner/ratio_max_dev_step/{k}"] for k in range(3)) > 1e-6
    assert metrics["learner/ratio_mean"] == pytest.approx(1, abs=metrics["learner/ratio_max_dev"])
    assert 0 < metrics["learner/clip_fraction"] < 1
    assert metrics["learner/grad_norm"] > job.config.learner.grad_clip  # both kinds of clipping at work


def test_first_ratio_is_exactly_one(results):
    for ranks in WORLDS:
        names = itertools.product((*SCHEDULES, "kl"), STAGES)
        for name in [*names, *METHODS, "bfloat16"] if ranks > 1 else names:
            assert results[0][ranks][name][1]["learner/ratio_initial_max_dev"] == 0, name


def test_log_probs_of_the_rollout_are_compared_and_used_only_if_asked_for(jobs, reference, results):
    done = results[0][2]
    same(done["drifted"][0], done["per_step", 2][0])
    is_that_of_a_plain_program("drifted, and used", done["drifted, and used"], jobs, reference("drifted, and used"))
    for name, shift, lost in (("drifted", 1e-3, 0.2), ("drifted, and used", 1e-3, 0.2), ("per_step", 0, 0)):
        metrics = done[(name, 2) if name == "per_step" else name][1]
        assert metrics["mismatch/log_prob_mean"] == pytest.approx(shift, abs=2e-6)
        assert metrics["mismatch/log_prob_p99"] == pytest.approx(shift, abs=2e-6)
        assert (metrics["mismatch/lost_edges"] > lost) if lost else (metrics["mismatch/lost_edges"] == 0)
        assert 0 <= metrics["mismatch/velocity"] < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_stale_rollouts_are_rescored_under_the_weights_that_sampled_them(stage, results):
    done = results[0][2]
    lora, metrics, error = done["one version old", "learner", stage]
    assert error is None
    assert metrics["mismatch/velocity"] < 1e-6  # of all states, the first step's, too
    assert metrics["mismatch/log_prob_p99"] < 2e-6
    assert metrics["learner/ratio_initial_max_dev"] > 1e-5
    same(lora, done["one version old", "rollout", stage][0], 1e-5)


def test_other_velocities_than_the_rollouts_stop_before_any_step(jobs, results):
    lora, _, error = results[0][2]["other velocities"]
    assert re.match(r"learner: the relative error .* is 0\.000999 .*learner\.velocity_tolerance=1e-05", error)
    assert "\n" not in error
    same(lora, lora_state(policy(jobs["other velocities"].config).transformer))


def test_log_probs_of_older_weights_are_allowed_where_they_are_expected(jobs, reference, results):
    is_that_of_a_plain_program("stale", results[0][2]["stale"], jobs, reference("stale"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops(stage, jobs, results):
    lora, _, error = results[0][2]["not finite", stage]
    assert "gradient is not finite" in error
    same(lora, lora_state(policy(jobs["not finite", stage].config).transformer))


@pytest.mark.parametrize("ranks", WORLDS)
def test_no_group_gives_up_before_the_limits_of_the_run(ranks, results):
    found = results[0][ranks]["timeouts"][1]
    assert len(found) > 1  # DeepSpeed makes groups of its own
    assert set(found.values()) == {HUNG_AFTER_S}


def test_a_backward_pass_takes_no_kernel_that_is_not_deterministic(results):
    """Attention looks for that, and not for a warning."""
    assert results[0][1]["strict"][1] == {"strict": True}


def test_missing_scores(reference, results):
    for name in ("unscored step", "one prompt"):
        lora, metrics, _ = results[0][2][name]
        expected, expected_metrics, *_ = reference(name)
        same(lora, expected, 1e-5)
        assert metrics["learner/loss"] == pytest.approx(expected_metrics["learner/loss"], abs=1e-5)
    assert "no edge has all of its scores" in results[0][2]["no scores"][2]


def test_groups_of_equal_scores_are_counted(jobs, reference, results):
    is_that_of_a_plain_program("equal scores", results[0][2]["equal scores"], jobs, reference("equal scores"))
    prompts, granularities = 3, 2
    assert results[0][2]["equal scores"][1]["advantage/zero_std_groups"] == prompts * granularities


def test_what_the_checks_of_training_read_shows_what_is_broken(jobs, results):
    done = results[0][2]

    def value(job, name):
        return done[job][1][name]

    for stage in STAGES:
        assert value(("per_step", stage), "watch/trained_modules") == 1
        assert value(("per_step", stage), "learner/eps_share") < 0.1
        # the rollouts of the second update are the first one's: the base sampled them
        assert value(("twice", stage), "watch/lora_effect") > 1e-3
        assert abs(value(("twice", stage), "watch/lora_delivered")) < 1e-3
    assert value(("per_step", 2), "watch/duplicate_children") == 0
    assert value("twins", "watch/duplicate_children") == 3  # one a prompt
    modules = len(lora_parameters(policy(jobs["twins"].config).transformer)) / 2
    assert value("a silent module", "watch/trained_modules") == pytest.approx(1 - 1 / modules)
    assert value("large eps", "learner/eps_share") == 1
    assert value(("per_step", 2), "watch/flat_groups") == 0
    assert value("equal scores", "watch/flat_groups") == pytest.approx(6 / (2 * 2 * 3 * 3))


@pytest.mark.parametrize("ranks", WORLDS)
def test_zero_3_partitions_every_parameter_before_it_starts(ranks, results):
    """Else it would first move the whole base to every device."""
    assert results[0][ranks]["partitioned"][1] == {1: False, 2: False, 3: True}


def test_a_bfloat16_base_has_a_float32_lora(jobs, results):
    done = results[0][2]
    lora, _, error = done["bfloat16"]
    assert error is None
    same(done["bfloat16", 3][0], done["bfloat16", 2][0], 1e-4)  # 2e-3 with DeepSpeed's own linear layer
    start = lora_state(policy(jobs["bfloat16"].config).transformer)
    moved = np.concatenate([(lora[name] - start[name]).ravel() for name in lora])
    assert all(array.dtype == np.float32 for array in lora.values())
    assert 0.5e-7 < np.abs(moved[moved != 0]).mean() < 4e-7  # three steps of 1e-7, lost if it were bfloat16


@pytest.mark.core
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
    from g2rpo_ray.learner.engine import _read_checkpoint

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
        group = LearnerGroup(config)
        try:
            return await body(group)
        finally:
            group.shutdown()

    return asyncio.run(main())


@pytest.mark.core
def test_group(cluster, pipeline, rollouts, results, tmp_path):
    async def learn(group):
        await group.start(120)
        update = await group.update([by_reference(rollout) for rollout in rollouts])
        published = await group.publish(1)
        files = await group.save(Folder(tmp_path / "checkpoint"))
        assert files == Folder(tmp_path / "checkpoint").digests()
        return update.metrics, *published

    async def publish_again(group, checkpoint):
        await group.start(120, checkpoint)
        return (await group.publish(2))[0]

    metrics, manifest, ref = with_group(settings(pipeline, ranks=2, zero_stage=3), learn)
    verify(ray.get(ref), manifest)
    lora, expected, _ = results[0][2]["per_step", 3]
    assert manifest == manifest_of(lora, 1)  # bit for bit what the ranks without Ray compute
    assert metrics == expected
    adapter = tmp_path / "checkpoint" / "lora"
    same(read_lora(adapter, settings(pipeline).lora), lora)
    from_adapter = settings(pipeline, lora_initial=str(adapter))
    for start, config in ((Folder(tmp_path / "checkpoint"), settings(pipeline)), (None, from_adapter)):
        assert with_group(config, partial(publish_again, checkpoint=start)) == manifest_of(lora, 2)


@pytest.mark.slow
def test_group_that_cannot_start(cluster, pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"learner\.safetensors: cannot be read"):
        with_group(settings(pipeline), lambda group: group.start(120, tmp_path))
    with pytest.raises(TimeoutError, match=r"learner\.resources"):
        with_group(settings(pipeline, resources={"CPU": 1, "nowhere": 1}), lambda group: group.start(1))


class Bomb:
    """Ends the process that fetches it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.slow
def test_a_rank_that_stands_still_in_its_start_is_lost_and_starts_again(cluster, pipeline):
    """Once it is known what a start takes: the first one has `startup_timeout_s`."""

    async def stop_a_rank():
        while not (found := [child for child in descendants() if "ray::LearnerRank.start" in title_of(child)]):
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

    failed, version = with_group(settings(pipeline).model_copy(update={"startup_timeout_s": 60}), body)
    assert isinstance(failed, LearnerLost)
    assert version == 0
    assert re.fullmatch(r"its ranks hung: not ready \d+ s after .*; other starts took \d+ s", str(failed))
