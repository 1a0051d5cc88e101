"""The algorithm against worked cases, against a plain sampler, and by its properties."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo_ray.algo import (
    BranchPlan,
    clipped_loss,
    complete,
    completion_path,
    integrate_advantages,
    reference_kl,
    resolution_shift,
    run_anchor,
    shifted_sigmas,
    transition,
)

CASES = json.loads((Path(__file__).parent / "golden" / "cases.json").read_text())
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def field(c, scale=1.0):
    """The velocity field written in each golden case."""

    def velocity(x, sigma):
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        return scale * (c[0] * x + c[1] * torch.sin(x) - c[2] * s + c[3] * s * torch.cos(2 * x))

    return velocity


def close(actual, expected, dtype):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def score(images, reward, name):
    if name == "distance":
        return -(images - torch.tensor(reward["target"], dtype=images.dtype)).abs().flatten(2).mean(-1)
    return torch.tanh(images).flatten(2).mean(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_golden(case, dtype):
    config = case["config"]
    sigmas = shifted_sigmas(config["steps"], config["shift"], dtype=dtype)
    close(sigmas, case["sigmas"], dtype)
    kernel, eta = config.get("kernel", "flow"), config["eta"]
    plan = BranchPlan(config["steps"], tuple(config["branch_steps"]), tuple(config["strides"]), config["layout"],
                      config["group"])  # fmt: skip
    assert plan.evaluations == case["nfe"]["unique"]
    assert plan.naive_evaluations == case["nfe"]["naive"]

    velocity = Counting(field(case["velocity"]["c"]))
    anchor = run_anchor(velocity, torch.tensor(case["initial"], dtype=dtype)[None], sigmas, plan.branch_steps)
    close(anchor.final[0], case["anchor"][-1], dtype)
    for m, branch in enumerate(case["branches"]):
        index = branch["step"]
        close(anchor.latents[m, 0], case["anchor"][index], dtype)
        noise = torch.tensor(branch["noise"], dtype=dtype)
        step = transition(kernel, anchor.latents[m], anchor.velocities[m], sigmas, index, eta, noise=noise)
        close(step.mean[0], branch["mean"], dtype)
        assert step.std == pytest.approx(branch["std"], rel=TOLERANCE[dtype])
        close(step.next_x, branch["next"], dtype)
        close(step.log_prob, branch["log_prob"], dtype)

        paths = plan.paths(index)
        assert paths == branch["paths"]
        images = complete(velocity, step.next_x, paths, sigmas, micro_batch=5)
        close(images, branch["images"], dtype)
        rewards = torch.stack([score(images, case["reward"], name) for name in branch["rewards"]])
        close(rewards, list(branch["rewards"].values()), dtype)

        exact = torch.tensor(list(branch["rewards"].values()), dtype=dtype)[:, None]
        close(integrate_advantages(exact, clip=None)[0], branch["advantage"], dtype)
        new_velocity = field(case["velocity"]["c"], 1.01)(anchor.latents[m], sigmas[index].expand(1))
        new = transition(kernel, anchor.latents[m], new_velocity, sigmas, index, eta, next_x=step.next_x)
        close(new.log_prob, branch["new_log_prob_if_velocity_times_1_01"], dtype)
        advantage = integrate_advantages(exact, clip=config["adv_max"])[0]
        old, new_log_prob = (
            torch.tensor(branch[key], dtype=dtype) for key in ("log_prob", "new_log_prob_if_velocity_times_1_01")
        )
        loss, _ = clipped_loss(new_log_prob, old, advantage, clip_range=config["clip"])
        close(loss, branch["loss"], dtype)
    assert velocity.evaluations == case["nfe"]["unique"]


def copy_into(ended):
    """What takes the rows that have ended, as they are then."""
    return lambda rows, latents: ended.update({row: latents[row].clone() for row in rows})


class Counting:
    """A velocity that counts what it is asked for."""

    def __init__(self, velocity):
        self.velocity, self.evaluations, self.batches = velocity, 0, []

    def __call__(self, x, sigma):
        assert sigma.shape == (len(x),)
        self.evaluations += len(x)
        self.batches.append(len(x))
        return self.velocity(x, sigma)


@pytest.mark.parametrize(
    ("strides", "layout", "naive", "unique"), [((1, 2), "authors", 1792, 1600), ((1, 2, 3), "paper", 2308, 2020)]
)
def test_costs_of_the_paper(strides, layout, naive, unique):
    plan = BranchPlan(16, tuple(range(8)), strides, layout, 12)
    assert (plan.naive_evaluations, plan.evaluations) == (naive, unique)


def test_paths_of_the_paper_and_of_the_authors():
    assert completion_path(0, 16, 2, "paper") == [1, 3, 5, 7, 9, 11, 13, 15, 16]
    assert completion_path(1, 16, 2, "authors") == [2, 3, 5, 7, 9, 11, 13, 16]
    assert completion_path(15, 16, 2, "paper") == completion_path(15, 16, 2, "authors") == [16]
    with pytest.raises(ValueError, match="layout"):
        completion_path(0, 16, 2, "other")


layouts = st.sampled_from(["paper", "authors"])


@given(steps=st.integers(1, 40), data=st.data(), stride=st.integers(1, 9), layout=layouts)
def test_every_path_runs_from_after_the_branch_to_the_image(steps, data, stride, layout):
    branch_step = data.draw(st.integers(0, steps - 1))
    path = completion_path(branch_step, steps, stride, layout)
    assert path[0] == branch_step + 1
    assert path[-1] == steps
    assert path == sorted(set(path))
    if stride == 1:
        assert path == list(range(branch_step + 1, steps + 1))


def plain_branch(velocity, x, path, sigmas):
    """One branch at a time, batch of one: the reference for the packed execution."""
    for now, then in itertools.pairwise(path):
        x = x + (sigmas[then] - sigmas[now]) * velocity(x[None], sigmas[now][None])[0]
    return x


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(2, 12), data=st.data(), layout=layouts, batch=st.integers(1, 40), seed=st.integers(0, 99))
def test_packed_execution_equals_one_branch_at_a_time(steps, data, layout, batch, seed):
    branch_steps = sorted(data.draw(st.sets(st.integers(0, steps - 1), min_size=1)))
    strides = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
    plan = BranchPlan(steps, tuple(branch_steps), tuple(strides), layout, 3)
    sigmas = shifted_sigmas(steps, 3.0, dtype=torch.float64)
    velocity = Counting(field([0.4, 0.8, 0.3, 0.7]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
    anchor = run_anchor(velocity, x, sigmas, branch_steps)
    torch.testing.assert_close(anchor.final[0], plain_branch(velocity.velocity, x[0], range(steps + 1), sigmas))
    for m, index in enumerate(branch_steps):
        noise = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
        step = transition("dance", anchor.latents[m], anchor.velocities[m], sigmas, index, 0.3, noise=noise)
        ended = {}
        images = complete(velocity, step.next_x, plan.paths(index), sigmas, batch, copy_into(ended))
        assert torch.equal(torch.stack([ended.pop(r) for r in range(3 * len(strides))]), images.flatten(0, 1))
        for j, path in enumerate(plan.paths(index)):
            for g in range(3):
                expected = plain_branch(velocity.velocity, step.next_x[g], path, sigmas)
                torch.testing.assert_close(images[j, g], expected, rtol=1e-12, atol=1e-12)
    assert velocity.evaluations == plan.evaluations
    assert max(velocity.batches) <= max(batch, 1)


def test_batches_stay_full_until_the_longest_path_is_alone():
    velocity = Counting(field([0.4, 0.8, 0.3, 0.7]))
    plan = BranchPlan(16, (0,), (1, 2, 3), "paper", 12)
    complete(velocity, torch.randn(12, 4), plan.paths(0), shifted_sigmas(16, 3.0), micro_batch=12)
    assert velocity.batches.count(12) >= len(velocity.batches) - 2


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps"])
@given(index=st.integers(0, 8), seed=st.integers(0, 99))
def test_without_noise_every_kernel_is_the_ode(kernel, index, seed):
    sigmas = shifted_sigmas(10, 3.0, dtype=torch.float64)
    x, v = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = transition(kernel, x, v, sigmas, index, 0.0)
    ode = transition("ode", x, v, sigmas, index, 0.7)
    torch.testing.assert_close(step.next_x, ode.next_x, rtol=1e-12, atol=1e-12)
    assert step.log_prob is None
    assert ode.log_prob is None


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps"])
@pytest.mark.parametrize("index", [0, 3])
def test_rescoring_gives_the_log_prob_of_sampling(kernel, index):
    sigmas = shifted_sigmas(10, 3.0)
    x, v, noise = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    sampled = transition(kernel, x, v, sigmas, index, 0.7, noise=noise)
    rescored = transition(kernel, x, v, sigmas, index, 0.7, next_x=sampled.next_x)
    assert torch.equal(sampled.log_prob, rescored.log_prob)
    if kernel != "cps":
        normal = torch.distributions.Normal(sampled.mean, sampled.std)
        torch.testing.assert_close(sampled.log_prob, normal.log_prob(sampled.next_x).mean((1, 2)))


def test_flow_kernel_at_pure_noise_uses_the_next_sigma():
    sigmas = shifted_sigmas(16, 3.0, dtype=torch.float64)
    step = transition("flow", torch.zeros(1, 2), torch.zeros(1, 2), sigmas, 0, 0.7, noise=torch.ones(1, 2))
    assert step.std == pytest.approx(0.7 * math.sqrt(1 / (1 - float(sigmas[1]))) * math.sqrt(1 - float(sigmas[1])))


def test_transition_refuses_unclear_calls():
    x, sigmas = torch.zeros(1, 2), shifted_sigmas(4, 3.0)
    with pytest.raises(ValueError, match="kernel: 'sde'"):
        transition("sde", x, x, sigmas, 0, 0.7, noise=x)
    with pytest.raises(ValueError, match="either noise or next_x"):
        transition("flow", x, x, sigmas, 0, 0.7)


def test_dynamic_shift_is_flux_s_formula():
    mu = 0.5 + (1.15 - 0.5) * (2025 - 256) / (4096 - 256)
    t = 1 - torch.arange(10, dtype=torch.float64) / 10
    expected = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    torch.testing.assert_close(shifted_sigmas(10, resolution_shift(2025), dtype=torch.float64)[:-1], expected)


rewards_seed = st.integers(0, 10_000)


def random_rewards(seed, shape=(2, 3, 2, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=rewards_seed, permutation=st.permutations(range(5)))
def test_permuting_members_permutes_advantages(seed, permutation):
    rewards = random_rewards(seed)
    permuted = integrate_advantages(rewards[..., list(permutation)])
    torch.testing.assert_close(permuted, integrate_advantages(rewards)[..., list(permutation)], rtol=1e-9, atol=1e-9)


@given(seed=rewards_seed, scale=st.floats(0.1, 100), offset=st.floats(-100, 100))
def test_an_affine_change_of_a_reward_changes_nothing(seed, scale, offset):
    rewards = random_rewards(seed)
    torch.testing.assert_close(
        integrate_advantages(rewards * scale + offset), integrate_advantages(rewards), rtol=1e-5, atol=1e-5
    )


def test_advantage_by_hand():
    rewards = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    torch.testing.assert_close(integrate_advantages(rewards), torch.tensor([[-1.0, 0.0, 1.0]]))
    two = torch.cat([rewards, rewards.flip(-1)])  # a second reward that disagrees
    torch.testing.assert_close(
        integrate_advantages(two, reward_weights=[1.0, 0.25]), torch.tensor([[-0.75, 0.0, 0.75]])
    )
    granular = rewards.repeat(1, 1, 2, 1)
    torch.testing.assert_close(
        integrate_advantages(granular, granularity_weights=[1.0, 3.0], clip=3.5), torch.tensor([[-3.5, 0.0, 3.5]])
    )


def test_a_missing_score_leaves_its_group_and_its_member_out():
    rewards = torch.tensor([[[[1.0, 2.0, 3.0, math.nan]]]])
    torch.testing.assert_close(integrate_advantages(rewards), torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))
    alone = torch.tensor([[[[1.0, math.nan, math.nan]]]])
    assert torch.equal(integrate_advantages(alone), torch.zeros(1, 3))


@given(value=st.floats(-1e6, 1e6, width=32), size=st.integers(2, 12))
def test_a_group_without_spread_has_no_advantage(value, size):
    assert torch.equal(integrate_advantages(torch.full((1, 1, 1, size), value)), torch.zeros(1, size))


def test_clipped_loss_by_hand():
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.2, 1.2, 0.8, 0.8])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = clipped_loss(new, old, advantage, clip_range=0.1)
    # A > 0 gains at most 1 + ε; A < 0 pays the whole of a ratio above 1, and at least 1 − ε below it
    torch.testing.assert_close(loss, torch.tensor((-1.1 + 1.2 - 0.8 + 0.9) / 4))
    assert metrics["clip_fraction"] == 1
    assert float(metrics["ratio_max_dev"]) == pytest.approx(0.2)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 1.2, -0.8, 0.0]) / 4)


def test_masked_entries_are_not_in_the_loss_and_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    new, old, advantage = torch.randn(3, 6, generator=generator)
    valid = torch.tensor([True, True, False, True, False, True])
    whole, _ = clipped_loss(new[valid], old[valid], advantage[valid], clip_range=0.1)
    new = torch.where(valid, new, torch.nan)
    parts = [
        clipped_loss(new[s], old[s], advantage[s], clip_range=0.1, valid=valid[s], denominator=4)[0]
        for s in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_reference_kl_is_the_kl_of_two_normals():
    mean, reference = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    p, q = torch.distributions.Normal(mean, 0.3), torch.distributions.Normal(reference, 0.3)
    torch.testing.assert_close(reference_kl(mean, reference, 0.3), torch.distributions.kl_divergence(p, q).mean(1))
