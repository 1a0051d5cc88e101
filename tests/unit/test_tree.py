"""Trees, their growth, credit and objectives: against worked cases, against brute force, and by their properties."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo_ray.algo.completion import completion_path
from g2rpo_ray.algo.credit import batch_std, edge_advantages
from g2rpo_ray.algo.growth import grow
from g2rpo_ray.algo.kernels import transition
from g2rpo_ray.algo.objectives import edge_losses, mean_shift
from g2rpo_ray.algo.schedule import shifted_sigmas
from g2rpo_ray.algo.tree import ANCHOR, Shape, compared_leaves, plan_tree

GOLDEN = Path(__file__).parents[1] / "golden"

CASES = json.loads((GOLDEN / "cases.json").read_text())

TREES = json.loads((GOLDEN / "trees.json").read_text())

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


class Counting:
    """A velocity that counts what it is asked for."""

    def __init__(self, velocity):
        self.velocity, self.evaluations, self.batches = velocity, 0, []

    def __call__(self, x, sigma):
        assert sigma.shape == (len(x),)
        self.evaluations += len(x)
        self.batches.append(len(x))
        return self.velocity(x, sigma)


def whole(velocity, tree, roots, sigmas, kernel, eta, noise, micro_batch=5):
    """The whole tree grown at once: every node's latent."""
    nodes = range(len(tree.index))
    return grow(velocity, tree, nodes, range(len(roots)), roots, sigmas, kernel=kernel, eta=eta,
                noise=lambda edges: noise[list(edges)], micro_batch=micro_batch, keep=nodes)  # fmt: skip


def none_as_minus_one(numbers):
    return [-1 if number is None else number for number in numbers]


def golden_shape(case):
    form = {key: tuple(value) if isinstance(value, list) else value for key, value in case["form"].items()}
    kernel, eta = form.pop("kernel", "flow"), form.pop("eta", 0.7)
    return Shape(case["steps"], anchors=form.pop("anchor", False), **form), kernel, eta


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", TREES, ids=[case["name"] for case in TREES])
def test_golden_tree(case, dtype):
    shape, kernel, eta = golden_shape(case)
    tree, sigmas = plan_tree(shape), shifted_sigmas(case["steps"], case["shift"], dtype=dtype)
    close(sigmas, case["sigmas"], dtype)
    scores = [np.array([leaf["rewards"] for leaf in p["leaves"]]).T for p in case["prompts"]]
    std = batch_std([tree] * len(scores), scores)
    close(torch.tensor(std), case["batch_std"], torch.float64)
    for prompt, rewards in zip(case["prompts"], scores, strict=True):
        nodes, edges, leaves = prompt["nodes"], prompt["edges"], prompt["leaves"]
        assert tree.index.tolist() == [node["index"] for node in nodes]
        assert tree.parent.tolist() == none_as_minus_one(node["parent"] for node in nodes)
        assert tree.edge.tolist() == none_as_minus_one(node["edge"] for node in nodes)
        for ours, key in ((tree.source, "parent"), (tree.target, "child"), (tree.start, "start"), (tree.end, "end")):
            assert ours.tolist() == [edge[key] for edge in edges]
        assert tree.trained.tolist() == [edge["trained"] for edge in edges]
        assert tree.leaf.tolist() == [leaf["node"] for leaf in leaves]
        assert tree.tag.tolist() == none_as_minus_one(leaf["tag"] for leaf in leaves)
        x = torch.tensor([node["x"] for node in nodes], dtype=dtype)
        noise = torch.tensor([edge["noise"] for edge in edges], dtype=dtype)
        velocity = Counting(field(case["velocity"]["c"]))
        grown = whole(velocity, tree, x[: shape.roots], sigmas, kernel, eta, noise)
        close(grown.latents, x.tolist(), dtype)
        assert (
            velocity.evaluations == tree.evaluations == prompt["evaluations"] == len(set(tree.parent[tree.parent >= 0]))
        )
        trained = [edge for edge in edges if edge["trained"]]
        where, limit = torch.tensor(tree.trained), case["advantage_clip"]
        close(grown.log_prob[where], [edge["log_prob"] for edge in trained], dtype)
        advantage = edge_advantages(tree, rewards, group=case["group"], spread=case["spread"], batch_std=std, clip=None)
        advantage = torch.tensor(advantage)
        close(advantage[where], [edge["advantage"] for edge in trained], dtype)
        assert not advantage[~where].any()
        check_losses(case, tree, grown.latents, sigmas, kernel, eta, edges, advantage.clamp(-limit, limit), dtype)


def check_losses(case, tree, x, sigmas, kernel, eta, edges, advantage, dtype):
    """Each edge's objectives under a policy of 1.01 times the velocity, the drift from the edge's own noise."""
    for e, edge in enumerate(edges):
        if not edge["trained"]:
            continue
        start, end, here, after = edge["start"], edge["end"], x[tree.source[e]][None], x[tree.target[e]][None]
        v = field(case["velocity"]["c"], 1.01)(here, sigmas[start].expand(1))
        new = transition(kernel, here, v, sigmas, start, eta, next_index=end, next_x=after)
        assert new.std == pytest.approx(edge["std"], rel=TOLERANCE[dtype])
        close(new.log_prob[0], edge["new_log_prob_if_velocity_times_1_01"], dtype)
        old_mean = after - new.std * torch.tensor(edge["noise"], dtype=dtype)
        close(old_mean[0], edge["mean"], dtype)
        drift = mean_shift(new.mean, old_mean, new.std)
        close(drift[0], edge["loss_drift"], dtype)
        old = torch.tensor([edge["log_prob"]], dtype=dtype)
        delta = (sigmas[end] - sigmas[start])[None]
        for objective in ("clip", "guard", "dppo"):
            loss = edge_losses(objective, new.log_prob, old, advantage[e][None].to(dtype), clip_range=case["clip"],
                               std=torch.tensor([new.std], dtype=dtype), drift=drift, delta=delta)  # fmt: skip
            close(loss[0], edge[f"loss_{objective}"], dtype)


def score(images, reward, name):
    if name == "distance":
        return -(images - torch.tensor(reward["target"], dtype=images.dtype)).abs().flatten(1).mean(-1)
    return torch.tanh(images).flatten(1).mean(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_golden_case_of_g2rpo(case, dtype):
    """The older cases, whose cost shares only the first velocity after a branch."""
    config = case["config"]
    sigmas = shifted_sigmas(config["steps"], config["shift"], dtype=dtype)
    close(sigmas, case["sigmas"], dtype)
    kernel, eta = config.get("kernel", "flow"), config["eta"]
    shape = Shape(config["steps"], 1, tuple(config["branch_steps"]), config["group"], strides=tuple(config["strides"]),
                  layout=config["layout"], anchors=True)  # fmt: skip
    tree = plan_tree(shape)
    velocity = Counting(field(case["velocity"]["c"]))
    noise = torch.tensor([row for branch in case["branches"] for row in branch["noise"]], dtype=dtype)
    grown = whole(velocity, tree, torch.tensor(case["initial"], dtype=dtype)[None], sigmas, kernel, eta, noise)
    assert velocity.evaluations == tree.evaluations <= case["nfe"]["unique"] <= case["nfe"]["naive"]
    close(grown.latents[list(tree.trunk)], case["anchor"], dtype)
    for branch in case["branches"]:
        index = branch["step"]
        edges = [subtree.edges.start for subtree in tree.subtrees if subtree.branch_step == index]
        assert [int(tree.start[edge]) for edge in edges] == [index] * config["group"]
        close(grown.latents[tree.target[edges]], branch["next"], dtype)
        close(grown.log_prob[edges], branch["log_prob"], dtype)
        paths = [completion_path(index, config["steps"], stride, config["layout"]) for stride in config["strides"]]
        assert paths == branch["paths"]
        leaves = np.array([list(tree.below(edge)) for edge in edges])  # [G, J]
        images = grown.latents[tree.leaf[leaves.T]]
        close(images, branch["images"], dtype)
        exact = torch.tensor(list(branch["rewards"].values()), dtype=dtype)  # [R, J, G]
        rewards = torch.stack([score(images.flatten(0, 1), case["reward"], name) for name in branch["rewards"]])
        close(rewards.view_as(exact), exact.tolist(), dtype)
        scores = torch.zeros(len(exact), len(tree.leaf), dtype=dtype)
        scores[:, leaves.T] = exact
        by_clip = partial(edge_advantages, tree, scores.numpy(), group="siblings", spread="group")
        found = {clip: torch.tensor(by_clip(clip=clip)[edges]) for clip in (None, config["adv_max"])}
        close(found[None], branch["advantage"], dtype)
        new, old = (
            torch.tensor(branch[key], dtype=dtype) for key in ("new_log_prob_if_velocity_times_1_01", "log_prob")
        )
        x = grown.latents[tree.source[edges[:1]]]
        v = field(case["velocity"]["c"], 1.01)(x, sigmas[index].expand(1))
        rescored = transition(kernel, x, v, sigmas, index, eta, next_x=grown.latents[tree.target[edges]])
        close(rescored.log_prob, new.tolist(), dtype)
        close(
            edge_losses("clip", new, old, found[config["adv_max"]], clip_range=config["clip"]).mean(),
            branch["loss"],
            dtype,
        )


PAPER = {"steps": 16, "branch_steps": tuple(range(8)), "children": 12, "anchors": True}


@pytest.mark.parametrize(
    ("shape", "evaluations"),
    [
        (Shape(**PAPER, strides=(1, 2), layout="authors"), 1504),
        (Shape(**PAPER, strides=(1, 2, 3)), 1912),
        (Shape(**PAPER, strides=(1, 2)), 1600),
        (Shape(10, branch_steps=(0, 1, 2, 3, 4), children=8, strides=(1, 2), anchors=True), 402),
        (Shape(6, roots=24, stochastic_edges=6), 24 * 6),
    ],
)
def test_costs(shape, evaluations):
    assert plan_tree(shape).evaluations == evaluations


@st.composite
def shapes(draw):
    steps = draw(st.integers(2, 9))
    length = draw(st.integers(1, min(3, steps)))
    edges = draw(st.integers(1, steps // length))
    last = steps - edges * length
    return Shape(
        steps,
        roots=draw(st.integers(1, 2)),
        branch_steps=tuple(sorted(draw(st.sets(st.integers(0, last), min_size=1, max_size=3)))),
        children=draw(st.integers(1, 3)),
        stochastic_edges=edges,
        edge_length=length,
        splits=tuple(sorted(draw(st.sets(st.integers(1, steps), max_size=2)))),
        strides=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))),
        layout=draw(st.sampled_from(["paper", "authors"])),
        anchors=draw(st.booleans()),
    )


def brute_force(shape):
    """The inner nodes of the tree, each by its way from the root: (index, stochastic edge or None) pairs."""
    inner, leaves = set(), []

    def walk(way, path):
        """An ODE path from the last place of `way`."""
        for then in path:
            inner.add(way)
            way = (*way, (then, None))
        leaves.append(way)

    def edges(way, number, to_go, tags):
        inner.add(way)
        end = way[-1][0] + shape.edge_length
        way = (*way, (end, number))
        if to_go == 1:
            for stride in shape.strides:
                walk(way, completion_path(end - 1, shape.steps, stride, shape.layout)[1:])
        else:
            for child in range(shape.width if end in shape.splits else 1):
                edges(way, child, to_go - 1, tags)

    for root in range(shape.roots):
        trunk = ((0, root),)
        last = shape.steps if shape.anchors else shape.branch_steps[-1]
        for index in range(last + 1):
            if index in shape.branch_steps:
                for child in range(shape.children):
                    edges(trunk, child, shape.stochastic_edges, None)
            if index < last:
                inner.add(trunk)
                trunk = (*trunk, (index + 1, None))
    return inner, leaves


@settings(max_examples=60)
@given(shape=shapes(), batch=st.integers(1, 30), slice_=st.integers(1, 5), kernel=st.sampled_from(["dance", "cps"]))
def test_any_part_in_any_batches_gives_the_same_tree_and_evaluates_each_inner_node_once(shape, batch, slice_, kernel):
    tree = plan_tree(shape)
    inner, leaves = brute_force(shape)
    assert tree.evaluations == len(inner)
    assert sum(tree.tag != ANCHOR) == len(leaves)
    sigmas = shifted_sigmas(shape.steps, 3.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(shape.roots, 2, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(tree.source), 2, 3, generator=generator, dtype=torch.float64)
    reference = one_by_one(field([0.4, 0.8, 0.3, 0.7]), tree, roots, sigmas, kernel, noise)
    velocity = Counting(field([0.4, 0.8, 0.3, 0.7]))
    options = {"kernel": kernel, "eta": 0.3, "noise": lambda edges: noise[list(edges)], "micro_batch": batch}
    trunk = grow(velocity, tree, tree.trunk, range(shape.roots), roots, sigmas, micro_batch=batch, keep=tree.trunk)
    torch.testing.assert_close(trunk.latents, reference[list(tree.trunk)], rtol=1e-11, atol=1e-11)
    for step in shape.branch_steps:
        for first in range(0, shape.roots * shape.children, slice_):
            part = tree.members(step, first, slice_)
            nodes = [node for subtree in part for node in subtree.nodes]
            points = sorted({int(tree.source[subtree.edges.start]) for subtree in part})
            ended = {}
            grown = grow(velocity, tree, nodes, points, trunk.latents[points], sigmas, v=trunk.velocities[points],
                         keep=nodes, ended=lambda rows, x, into=ended: into.update({r: x[r].clone() for r in rows}),
                         **options)  # fmt: skip
            torch.testing.assert_close(grown.latents, reference[nodes], rtol=1e-11, atol=1e-11)
            images = [node for node in nodes if node in tree.images]
            assert torch.equal(torch.stack([ended.pop(row) for row in range(len(images))]), grown.ends)
            torch.testing.assert_close(grown.ends, reference[images], rtol=1e-11, atol=1e-11)
            edges = [edge for subtree in part for edge in subtree.edges]
            assert torch.isnan(grown.log_prob).tolist() == [
                kernel == "cps" and tree.end[e] == shape.steps for e in edges
            ]
    assert velocity.evaluations == tree.evaluations
    assert max(velocity.batches) <= batch


def one_by_one(velocity, tree, roots, sigmas, kernel, noise):
    """Every node from its parent, one at a time: the reference."""
    x = list(roots)
    for node in range(len(roots), len(tree.index)):
        parent, index, edge = int(tree.parent[node]), int(tree.index[node]), int(tree.edge[node])
        start = int(tree.index[parent])
        v = velocity(x[parent][None], sigmas[start][None])
        if edge < 0:
            x.append(x[parent] + (sigmas[index] - sigmas[start]) * v[0])
        else:
            step = transition(kernel, x[parent][None], v, sigmas, start, 0.3, next_index=index, noise=noise[edge][None])
            x.append(step.next_x[0])
    return torch.stack(x)


def test_batches_stay_full_until_the_longest_path_is_alone():
    tree = plan_tree(Shape(**PAPER | {"branch_steps": (0,), "anchors": False}, strides=(1, 2, 3)))
    velocity, x = Counting(field([0.4, 0.8, 0.3, 0.7])), torch.randn(1, 4)
    grow(velocity, tree, range(1, len(tree.index)), [0], x, shifted_sigmas(16, 3.0), v=x, kernel="flow", eta=0.7,
         noise=lambda edges: torch.randn(len(edges), 4), micro_batch=12)  # fmt: skip
    assert set(velocity.batches) == {12}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"branch_steps": (9,)}, ["branch_steps: [9] given", "0..7", "2 stochastic edges of length 4"]),
        ({"branch_steps": (1, 0)}, ["branch_steps: [1, 0]", "ascending"]),
        ({"branch_steps": ()}, ["branch_steps: []"]),
        ({"strides": (0, 1)}, ["strides: [0, 1] given", "at least 1"]),
        ({"roots": 0}, ["roots"]),
        ({"edge_length": 0}, ["edge_length"]),
        ({"roots": 1000, "children": 1000}, ["1000000 images per prompt", "at most 13333"]),
        ({"splits": tuple(range(1, 15)), "width": 64}, ["images per prompt", "at most 13333"]),
    ],
)
def test_a_shape_that_leads_nowhere_is_refused(change, words):
    good = {"steps": 15, "stochastic_edges": 2, "edge_length": 4, "branch_steps": (0,), "strides": (1,), "roots": 1}
    with pytest.raises(ValueError, match=r".") as refusal:
        plan_tree(Shape(**good | change))
    assert all(word in str(refusal.value) for word in words)


def flat_tree(children, strides=(1,), steps=4):
    return plan_tree(Shape(steps, children=children, strides=strides))


def advantages(tree, scores, **options):
    return edge_advantages(tree, np.asarray(scores), **{"group": "siblings", "spread": "group"} | options)


def test_advantage_by_hand():
    tree = flat_tree(3)
    scores = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(advantages(tree, scores), [-1.0, 0.0, 1.0])
    two = np.concatenate([scores, scores[:, ::-1]])  # a second reward that disagrees
    np.testing.assert_allclose(advantages(tree, two, reward_weights=[1.0, 0.25]), [-0.75, 0.0, 0.75])
    np.testing.assert_allclose(advantages(tree, scores, spread="batch", batch_std=[0.4999]), [-2.0, 0.0, 2.0])
    granular, tree = np.array([[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]]), flat_tree(3, (1, 2))
    assert tree.tag.tolist() == [0, 1] * 3
    np.testing.assert_allclose(advantages(tree, granular, granularity_weights=[1.0, 3.0], clip=3.5), [-3.5, 0.0, 3.5])


def test_the_value_of_an_edge_is_the_mean_of_the_leaves_below_it():
    tree = plan_tree(Shape(3, children=2, stochastic_edges=2, splits=(1,), width=2))
    assert tree.start.tolist() == [0, 1, 1, 0, 1, 1]
    found = advantages(tree, [[1.0, 3.0, 5.0, 7.0]], group="step", clip=None).tolist()
    assert found[::3] == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-6)  # values 2 and 6
    assert found[1:3] + found[4:] == pytest.approx([x / math.sqrt(20 / 3) for x in (-3, -1, 1, 3)], rel=1e-6)
    siblings = advantages(tree, [[1.0, 3.0, 5.0, 7.0]], clip=None).tolist()
    assert siblings[1:3] == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-6)


def test_a_missing_score_leaves_its_group_and_its_member_out():
    tree = flat_tree(4)
    np.testing.assert_allclose(advantages(tree, [[1.0, 2.0, 3.0, math.nan]]), [-1.0, 0.0, 1.0, 0.0])
    assert not advantages(tree, [[1.0, math.nan, math.nan, math.nan]]).any()
    both = flat_tree(2, (1, 2))
    assert not advantages(both, [[1.0, math.nan, 2.0, 3.0]])[0]  # one granularity of the first is missing


@given(value=st.floats(-1e6, 1e6, width=32), size=st.integers(2, 12))
def test_a_group_without_spread_has_no_advantage(value, size):
    for options in ({"spread": "group"}, {"spread": "batch", "batch_std": [0.5]}):
        assert not advantages(flat_tree(size), np.full((1, size), value), **options).any()


def test_a_group_whose_values_differ_by_no_more_than_the_least_spread_has_no_advantage_by_that_reward():
    scores = np.array([[1.0, 2.0, 3.0], [0.5, 0.25, 0.5]])
    for least, found in ((0.0, None), (0.25, [-1.0, 0.0, 1.0]), (1.9, [-1.0, 0.0, 1.0]), (2.0, [0.0] * 3)):
        expected = advantages(flat_tree(3), scores) if found is None else found
        np.testing.assert_allclose(advantages(flat_tree(3), scores, least_spread=least), expected)
    assert advantages(flat_tree(3), scores)[1] < 0
    assert not advantages(flat_tree(3), [[1.0, math.nan, math.nan]], least_spread=9.0).any()


seeds = st.integers(0, 10_000)


def random_scores(seed, rewards=2, children=5, granularities=2):
    shape = (rewards, children * granularities)
    return np.random.default_rng(seed).standard_normal(shape)


@given(seed=seeds, permutation=st.permutations(range(5)))
def test_permuting_members_permutes_advantages(seed, permutation):
    tree, scores = flat_tree(5, (1, 2)), random_scores(seed)
    permuted = scores.reshape(2, 5, 2)[:, list(permutation)].reshape(2, 10)
    np.testing.assert_allclose(
        advantages(tree, permuted), advantages(tree, scores)[list(permutation)], rtol=1e-9, atol=1e-9
    )


@given(seed=seeds, scale=st.floats(0.1, 100), offset=st.floats(-100, 100))
def test_an_affine_change_of_a_reward_changes_nothing(seed, scale, offset):
    tree, scores = flat_tree(5, (1, 2)), random_scores(seed)
    np.testing.assert_allclose(
        advantages(tree, scores * scale + offset), advantages(tree, scores), rtol=1e-5, atol=1e-5
    )


def test_credit_refuses_what_it_does_not_know():
    tree, scores = flat_tree(2), np.array([[1.0, 2.0]])
    with pytest.raises(ValueError, match="group: 'all' given"):
        advantages(tree, scores, group="all")
    with pytest.raises(ValueError, match="spread: 'all' given"):
        advantages(tree, scores, spread="all")
    with pytest.raises(ValueError, match="needs batch_std"):
        advantages(tree, scores, spread="batch")


def test_subtrees_are_ranges_that_make_up_the_tree():
    tree = plan_tree(
        Shape(6, roots=2, branch_steps=(0, 2), children=2, stochastic_edges=2, splits=(1,), strides=(1, 3))
    )
    for kind, size in (("nodes", len(tree.index)), ("edges", len(tree.source)), ("leaves", len(tree.leaf))):
        ranges = [getattr(subtree, kind) for subtree in tree.subtrees]
        start = tree.trunk.stop if kind == "nodes" else 0
        assert list(itertools.chain.from_iterable(ranges)) == list(range(start, size))
    assert [(s.root, s.branch_step, s.child) for s in tree.members(2, 1, 2)] == [(0, 2, 1), (1, 2, 0)]


COMPARED = {  # leaves that are compared, by what stands in them: (root, branch step, child, granularity)
    "g2rpo": (Shape(6, branch_steps=(0, 2), children=3, strides=(1, 2), anchors=True), "siblings", 4, 3),
    "step": (Shape(6, roots=2, branch_steps=(0, 2), children=3), "step", 2, 6),
    "chain": (Shape(5, roots=4, stochastic_edges=3), "step", 1, 4),
    "branching": (Shape(5, children=2, stochastic_edges=4, splits=(1, 3)), "siblings", 1, 8),
}


@pytest.mark.parametrize("case", COMPARED)
def test_compared_leaves_are_those_that_an_advantage_depends_on(case):
    """Brute force: change one leaf's score, and see whose edges' advantages move."""
    shape, group, parts, size = COMPARED[case]
    tree = plan_tree(shape)
    found = compared_leaves(tree, group)
    assert (len(found), {len(leaves) for leaves in found}) == (parts, {size})
    assert sorted(np.concatenate(found)) == np.flatnonzero(tree.tag != ANCHOR).tolist()
    scores = np.random.default_rng(0).random((1, len(tree.leaf)))
    before = edge_advantages(tree, scores, group=group, spread="group")
    for leaf in np.flatnonzero(tree.tag != ANCHOR):
        changed = scores.copy()
        changed[0, leaf] += 3.0
        moved = np.flatnonzero(edge_advantages(tree, changed, group=group, spread="group") != before).tolist()
        mine = next(set(leaves.tolist()) for leaves in found if leaf in leaves)
        assert moved
        assert {at for edge in moved for at in tree.below(edge) if tree.tag[at] == tree.tag[leaf]} <= mine
