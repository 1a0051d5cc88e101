"""Schedule, paths, kernels, objectives and signals: by hand, against torch's own distributions, by their properties.

Trees, their growth and credit are in test_tree.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g2rpo_ray.algo.completion import completion_path
from g2rpo_ray.algo.growth import grow, integrate
from g2rpo_ray.algo.kernels import ode_step, step_between, time_weight, transition
from g2rpo_ray.algo.objectives import OBJECTIVES, edge_losses, edge_ratios, mean_shift, policy_loss
from g2rpo_ray.algo.schedule import resolution_shift, shifted_sigmas
from g2rpo_ray.algo.signal import agreement, spreads
from g2rpo_ray.algo.tree import Shape, plan_tree


def test_schedule_by_hand():
    assert shifted_sigmas(2, 3.0).tolist() == [1.0, 0.75, 0.0]
    assert shifted_sigmas(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_dynamic_shift_is_flux_s_formula():
    mu = 0.5 + (1.15 - 0.5) * (2025 - 256) / (4096 - 256)
    t = 1 - torch.arange(10, dtype=torch.float64) / 10
    expected = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    torch.testing.assert_close(shifted_sigmas(10, resolution_shift(2025), dtype=torch.float64)[:-1], expected)


def test_paths_of_the_paper_and_of_the_authors():
    assert completion_path(0, 16, 2, "paper") == [1, 3, 5, 7, 9, 11, 13, 15, 16]
    assert completion_path(1, 16, 2, "authors") == [2, 3, 5, 7, 9, 11, 13, 16]
    assert completion_path(15, 16, 2, "paper") == completion_path(15, 16, 2, "authors") == [16]
    with pytest.raises(ValueError, match="layout"):
        completion_path(0, 16, 2, "other")


@given(steps=st.integers(1, 40), data=st.data(), stride=st.integers(1, 9), layout=st.sampled_from(["paper", "authors"]))
def test_every_path_runs_from_after_the_branch_to_the_image(steps, data, stride, layout):
    branch_step = data.draw(st.integers(0, steps - 1))
    path = completion_path(branch_step, steps, stride, layout)
    assert path[0] == branch_step + 1
    assert path[-1] == steps
    assert path == sorted(set(path))
    if stride == 1:
        assert path == list(range(branch_step + 1, steps + 1))


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps"])
@given(index=st.integers(0, 8), seed=st.integers(0, 99))
def test_without_noise_every_kernel_is_the_ode(kernel, index, seed):
    sigmas = shifted_sigmas(10, 3.0, dtype=torch.float64)
    x, v = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for then in (index + 1, 10):
        step = transition(kernel, x, v, sigmas, index, 0.0, next_index=then)
        ode = transition("ode", x, v, sigmas, index, 0.7, next_index=then)
        torch.testing.assert_close(step.next_x, ode.next_x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ode.next_x, x + (sigmas[then] - sigmas[index]) * v, rtol=1e-12, atol=1e-12)
        assert step.log_prob is None
        assert ode.log_prob is None


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps"])
@pytest.mark.parametrize(("index", "then"), [(0, 1), (3, 4), (0, 3), (3, 7)])
def test_rescoring_gives_the_log_prob_of_sampling(kernel, index, then):
    sigmas = shifted_sigmas(10, 3.0)
    x, v, noise = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    sampled = transition(kernel, x, v, sigmas, index, 0.7, next_index=then, noise=noise)
    rescored = transition(kernel, x, v, sigmas, index, 0.7, next_index=then, next_x=sampled.next_x)
    assert torch.equal(sampled.log_prob, rescored.log_prob)
    if kernel == "cps":
        torch.testing.assert_close(sampled.log_prob, -((sampled.next_x - sampled.mean) ** 2).mean((1, 2)))
    else:
        normal = torch.distributions.Normal(sampled.mean, sampled.std)
        torch.testing.assert_close(sampled.log_prob, normal.log_prob(sampled.next_x).mean((1, 2)))


def test_flow_kernel_at_pure_noise_uses_the_next_sigma():
    sigmas = shifted_sigmas(16, 3.0, dtype=torch.float64)
    step = transition("flow", torch.zeros(1, 2), torch.zeros(1, 2), sigmas, 0, 0.7, noise=torch.ones(1, 2))
    assert step.std == pytest.approx(0.7 * math.sqrt(1 / (1 - float(sigmas[1]))) * math.sqrt(1 - float(sigmas[1])))


def test_a_long_step_by_hand():
    """Sigmas 1, .9, .75, .5, 0; x = 2, v = 1: estimates of the image 2 − σ and of the noise 3 − σ."""
    sigmas = shifted_sigmas(4, 3.0, dtype=torch.float64)
    assert sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    x, v, noise = (torch.full((1, 3), value, dtype=torch.float64) for value in (2.0, 1.0, 0.5))

    def take(kernel, index, then, eta=0.7):
        step = transition(kernel, x, v, sigmas, index, eta, next_index=then, noise=noise)
        assert step.next_x.tolist()[0] == pytest.approx([float(step.mean[0, 0]) + 0.5 * step.std] * 3)
        return float(step.mean[0, 0]), step.std

    g2 = 0.49 * 0.9 / 0.1  # from .9 to .5
    assert take("flow", 1, 3) == pytest.approx((2 - 0.4 - g2 / 1.8 * 2.1 * 0.4, math.sqrt(g2 * 0.4)))
    g2 = 0.49 / 0.1  # from 1, where σ_1 is below the root however far the step goes, to .75
    assert take("flow", 0, 2) == pytest.approx((2 - 0.25 - g2 / 2 * 2 * 0.25, math.sqrt(g2 * 0.25)))
    assert take("dance", 1, 3, 0.3) == pytest.approx((2 - 0.4 - 0.09 / 1.8 * 2.1 * 0.4, 0.3 * math.sqrt(0.4)))
    std = 0.5 * math.sin(0.4 * math.pi)
    assert take("cps", 1, 3, 0.8) == pytest.approx((0.5 * 1.1 + math.sqrt(0.25 - std**2) * 2.1, std))


def test_a_cps_step_to_the_image_has_no_noise():
    sigmas = shifted_sigmas(4, 3.0)
    x, v, noise = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    step = transition("cps", x, v, sigmas, 3, 0.8, noise=noise)
    assert (step.std, step.log_prob) == (0, None)
    torch.testing.assert_close(step.next_x, x - sigmas[3] * v)


@pytest.mark.parametrize("kernel", ["ode", "flow", "dance", "cps"])
def test_step_between_needs_no_grid(kernel):
    sigmas = shifted_sigmas(10, 3.0, dtype=torch.float64)
    x, v, noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for index, then in ((0, 1), (0, 4), (3, 8)):
        on_grid = transition(kernel, x, v, sigmas, index, 0.7, next_index=then, noise=noise)
        levels = float(sigmas[index]), float(sigmas[then])
        between = step_between(kernel, x, v, *levels, 0.7, first=float(sigmas[1]), noise=noise)
        assert torch.equal(on_grid.next_x, between.next_x)
        assert on_grid.std == between.std
    off_grid = step_between(kernel, x, v, 0.6, 0.35, 0.7, first=0.9, noise=noise)  # `first` matters at 1 alone
    other = step_between(kernel, x, v, 0.6, 0.35, 0.7, first=0.5, noise=noise)
    assert torch.equal(off_grid.next_x, other.next_x)
    expected = {"ode": 0, "flow": 0.7 * math.sqrt(1.5), "dance": 0.7}  # g at .6
    std = 0.35 * math.sin(0.35 * math.pi) if kernel == "cps" else expected[kernel] * 0.5
    assert off_grid.std == pytest.approx(std)


def test_transition_refuses_unclear_calls():
    x, sigmas = torch.zeros(1, 2), shifted_sigmas(4, 3.0)
    with pytest.raises(ValueError, match="kernel: 'sde'"):
        transition("sde", x, x, sigmas, 0, 0.7, noise=x)
    with pytest.raises(ValueError, match="either noise or next_x"):
        transition("flow", x, x, sigmas, 0, 0.7)
    with pytest.raises(ValueError, match="either noise or next_x"):
        transition("flow", x, x, sigmas, 0, 0.7, noise=x, next_x=x)


def test_integrating_is_one_ode_step_after_another_as_in_a_trunk():
    sigmas = shifted_sigmas(5, 3.0, dtype=torch.float64)
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(x, sigma):
        assert sigma.shape == (len(x),)
        return torch.sin(x) - sigma[:, None]

    x = start
    for now, then in itertools.pairwise(sigmas):
        x = ode_step(x, velocity(x, now.expand(3)), now, then)
    torch.testing.assert_close(integrate(velocity, start, sigmas), x, rtol=1e-12, atol=1e-12)
    tree = plan_tree(Shape(5, roots=3, anchors=True))
    grown = grow(velocity, tree, tree.trunk, range(3), start, sigmas, micro_batch=2)
    torch.testing.assert_close(grown.ends, x, rtol=1e-12, atol=1e-12)


def test_clipped_loss_by_hand():
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.2, 1.2, 0.8, 0.8])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = policy_loss("clip", new, old, advantage, clip_range=0.1)
    # A > 0 gains at most 1 + ε; A < 0 pays the whole of a ratio above 1, and at least 1 − ε below it
    torch.testing.assert_close(loss, torch.tensor((-1.1 + 1.2 - 0.8 + 0.9) / 4))
    assert metrics["clip_fraction"] == 1
    assert float(metrics["ratio_mean"]) == pytest.approx(1)
    assert float(metrics["ratio_max_dev"]) == pytest.approx(0.2)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 1.2, -0.8, 0.0]) / 4)


def test_guard_by_hand():
    """ρ = exp(std (Δ + d)) is clipped as above; the loss is over the step's length, whatever its sign."""
    difference = torch.tensor([0.5, 0.5, -0.5], requires_grad=True)
    drift, std = torch.tensor([0.1, 0.1, 0.3], requires_grad=True), torch.tensor([0.5, 0.5, 2.0])
    given = {"std": std, "drift": drift}
    ratio = [math.exp(0.3), math.exp(0.3), math.exp(-0.4)]
    assert edge_ratios("guard", difference, torch.zeros(3), **given).tolist() == pytest.approx(ratio)
    losses = edge_losses("guard", difference, torch.zeros(3), torch.tensor([1.0, -2.0, 1.0]), clip_range=0.1,
                         delta=torch.tensor([-0.25, -0.5, -0.1]), **given)  # fmt: skip
    assert losses.tolist() == pytest.approx([-1.1 / 0.25, 2 * ratio[1] / 0.5, -ratio[2] / 0.1])
    losses.sum().backward()
    slopes = [0, 2 * ratio[1] / 0.5 * 0.5, -ratio[2] / 0.1 * 2]
    assert difference.grad.tolist() == pytest.approx(slopes)
    assert drift.grad.tolist() == pytest.approx(slopes)  # the drift is a function of the new policy, too


def test_dppo_by_hand():
    """An edge is left out where its drift has reached 1e-5 and it moves away; on its way back it stays in."""
    cases = [  # ratio, advantage, drift, loss
        (1.2, 1.0, 2e-5, 0.0), (1.2, 1.0, 0.5e-5, -1.2), (1.2, -1.0, 2e-5, 1.2), (0.8, -1.0, 2e-5, 0.0),
        (0.8, 1.0, 2e-5, -0.8), (1.0, 1.0, 2e-5, -1.0), (1.2, 1.0, 1e-5, 0.0),
    ]  # fmt: skip
    ratio, advantage, drift, expected = torch.tensor(cases, dtype=torch.float64).T
    new = ratio.log().requires_grad_()
    losses = edge_losses("dppo", new, torch.zeros_like(new), advantage, clip_range=1e-4, drift=drift)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    torch.testing.assert_close(new.grad, expected)  # −Aρ is its own slope in log ρ


def test_reinforce_by_hand():
    """The loss is −A whatever the old policy says, and its slope is that of −A log p."""
    new, advantage = torch.tensor([0.3, -2.0, 5.0], requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    for old in (new.detach(), torch.zeros(3)):
        new.grad = None
        loss, _ = policy_loss("reinforce", new, old, advantage, clip_range=1e-4)
        assert loss.item() == pytest.approx((-1 + 2 - 0.5) / 3)
        loss.backward()
        torch.testing.assert_close(new.grad, -advantage / 3)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective: 'ppo' given; allowed are clip, guard, dppo, reinforce"):
        edge_losses("ppo", *torch.zeros(3, 2), clip_range=0.1)


def edges(seed=0, number=6):
    """What `policy_loss` takes, random: log-probabilities, advantages, and the rest by name."""
    generator = torch.Generator().manual_seed(seed)
    new, old, advantage = torch.randn(3, number, generator=generator)
    std, drift, weight = torch.rand(3, number, generator=generator) + 0.1
    return (new, old, advantage), {"std": std, "drift": drift, "weight": weight, "delta": -std.square()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_weighted_mean_over_edges(objective):
    (new, old, advantage), given = edges()
    loss, _ = policy_loss(objective, new, old, advantage, clip_range=0.1, **given)
    weight = given.pop("weight")
    losses = edge_losses(objective, new, old, advantage, clip_range=0.1, **given)
    assert float(loss) == pytest.approx(sum(w * x for w, x in zip(weight.tolist(), losses.tolist(), strict=True)) / 6)
    plain, _ = policy_loss(objective, new, old, advantage, clip_range=0.1, **given)
    torch.testing.assert_close(plain, losses.mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_entries_are_not_in_the_loss_and_parts_add_up(objective):
    (new, old, advantage), given = edges()
    valid = torch.tensor([True, True, False, True, False, True])

    def part(rows, new, **options):
        there = {name: value[rows] for name, value in given.items()}
        return policy_loss(objective, new[rows], old[rows], advantage[rows], clip_range=0.1, **there, **options)

    whole, expected = part(valid, new)
    given["drift"] = torch.where(valid, given["drift"], torch.nan)
    new = torch.where(valid, new, torch.nan).requires_grad_()
    parts = [part(s, new, valid=valid[s], denominator=4) for s in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name in ("ratio_mean", "clip_fraction"):
        torch.testing.assert_close(sum(metrics[name] for _, metrics in parts), expected[name])
    assert max(metrics["ratio_max_dev"] for _, metrics in parts) == expected["ratio_max_dev"]
    sum(loss for loss, _ in parts).backward()
    assert not new.grad[~valid].any()
    assert new.grad.isfinite().all()
    nothing, metrics = part(slice(0, 6), new, valid=torch.zeros(6, dtype=torch.bool))
    assert (nothing.item(), float(metrics["ratio_max_dev"])) == (0, 0)


def test_the_shift_of_a_mean_is_the_kl_of_two_normals():
    mean, reference = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    p, q = torch.distributions.Normal(mean, 0.3), torch.distributions.Normal(reference, 0.3)
    torch.testing.assert_close(mean_shift(mean, reference, 0.3), torch.distributions.kl_divergence(p, q).mean(1))


FINE, ALIKE, REVERSED, PARTLY = (1.0, 2.0, 3.0), (10.0, 20.0, 30.0), (3.0, 2.0, 1.0), (1.0, 3.0, 2.0)


def two_groups(*scores):
    """Branch steps 0 and 1 of 6, three children each, granularities 1 and 2; scores by (step, granularity), [Q]."""
    tree = plan_tree(Shape(6, branch_steps=(0, 1), children=3, strides=(1, 2)))
    assert tree.tag.tolist() == [0, 1] * 6
    return tree, np.array(scores).reshape(2, 2, 3).swapaxes(1, 2).flatten()


def test_agreement_by_hand():
    tree, scores = two_groups(FINE, ALIKE, FINE, PARTLY)
    found = agreement(tree, scores[None], group="siblings", finest=0)
    np.testing.assert_allclose(found, [[1.0, 1.0], [1.0, 0.5]])
    _, opposite = two_groups(FINE, REVERSED, (2.0, 2.0, 2.0), FINE)
    found = agreement(tree, opposite[None], group="siblings", finest=0)
    assert found[:, 0].tolist() == pytest.approx([1, -1])
    assert np.isnan(found[:, 1]).all()  # no spread
    # advantages (−3, 0, 3) and (−1, 1, 0) + 2 (1, 0, −1) = (1, 1, −2)
    both = np.stack([two_groups(FINE, PARTLY, FINE, FINE)[1], two_groups(FINE, REVERSED, FINE, FINE)[1]])
    found = agreement(tree, both, group="siblings", finest=0, reward_weights=[1.0, 2.0])
    assert found[1].tolist() == pytest.approx([-9 / math.sqrt(18 * 6), 1])
    assert agreement(tree, both, group="siblings", finest=1, reward_weights=[1.0, 2.0])[0, 0] == found[1, 0]


def test_agreement_is_over_the_edges_that_have_all_scores():
    tree = plan_tree(Shape(6, children=4, strides=(1, 2)))
    scores = np.array([[1.0, 1.0, 2.0, 3.0, 3.0, 2.0, math.nan, 50.0]])
    assert agreement(tree, scores, group="siblings", finest=0)[1].tolist() == pytest.approx([0.5])


def test_spreads_by_hand():
    tree, scores = two_groups(FINE, ALIKE, (2.0, 2.0, 2.0), (4.0, 4.0, math.nan))
    assert spreads(tree, scores, group="siblings") == {0: [pytest.approx(5.5)], 1: [0.0]}  # means 5.5, 11, 16.5
    alone = np.where(np.arange(12) < 4, scores, math.nan)
    assert spreads(tree, alone, group="siblings") == {0: [pytest.approx(5.5 / math.sqrt(2))]}
    tree = plan_tree(Shape(3, roots=2, children=2))
    scores = np.array([1.0, 3.0, 5.0, 9.0])
    by_root = {0: [pytest.approx(math.sqrt(2)), pytest.approx(math.sqrt(8))]}
    assert spreads(tree, scores, group="siblings") == by_root
    assert spreads(tree, scores, group="step") == {0: [pytest.approx(math.sqrt(35 / 3))]}


def test_time_weights_give_every_step_a_gradient_of_the_same_size():
    """With a shift of 12, as video models have, it differs by more than 5 times without them."""
    sigmas, noise = shifted_sigmas(10, 12.0), torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    sizes, weighted = [], []
    for index in range(9):
        velocity = torch.zeros(1, 4000, requires_grad=True)
        reached = transition("flow", noise, velocity, sigmas, index, 0.7, noise=noise.roll(1)).next_x.detach()
        found = transition("flow", noise, velocity, sigmas, index, 0.7, next_x=reached)
        (gradient,) = torch.autograd.grad(found.log_prob.sum(), velocity)
        sizes.append(float(gradient.norm()))
        weighted.append(sizes[-1] * time_weight(*(float(sigmas[at]) for at in (index, index + 1, 1))))
    assert max(sizes) > 5 * min(sizes)
    assert weighted[1:] == pytest.approx([weighted[1]] * 8, rel=1e-3)
    assert weighted[0] * (1 + 0.7**2 / 2) == pytest.approx(weighted[1], rel=1e-3)  # no drift by g at pure noise
