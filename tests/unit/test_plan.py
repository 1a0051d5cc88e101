"""From settings to trees, units and keys: what moves, what is drawn, what each unit grows, and the plan in words."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo_ray.actors.cluster import _store_memory
from g2rpo_ray.algo.credit import edge_advantages
from g2rpo_ray.commands.plan import describe_plan
from g2rpo_ray.config import load_config
from g2rpo_ray.learner.batch import BatchShape
from g2rpo_ray.methods import method_names
from g2rpo_ray.models import lora_shapes
from g2rpo_ray.rehearsal.full_size import learner_memory
from g2rpo_ray.rollout.cost import learner_states, object_store_bytes, update_cost
from g2rpo_ray.rollout.plan import (
    branch_part,
    branch_units,
    edge_key,
    image_key,
    possible_trees,
    prompt_tree,
    trunk_part,
    with_credit_scores,
)
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import BranchUnit, PromptRollout, TrunkUnit

PROMPTS = [f"prompt {number}" for number in range(60)]


def of(method, *overrides):
    return load_config(None, [f"method={method}", *overrides])


def branch_steps(config, iteration=0, slot=0, prompt="x"):
    return sorted({subtree.branch_step for subtree in prompt_tree(config, iteration, slot, prompt).subtrees})


def test_the_window_moves_on_by_one_and_wraps_when_it_no_longer_fits():
    config = of("mix_grpo", "sampler.steps=25")
    at = [branch_steps(config, iteration) for iteration in range(25 * 45)]
    assert at[:25] == [[0]] * 25
    assert at[25:50] == [[1]] * 25
    # 4 stochastic steps: the last place is 21, from where they end at the image
    assert [at[25 * move] for move in range(45)] == [[move % 22] for move in range(45)]
    tree = prompt_tree(config, 25 * 21, 0, "x")
    assert (tree.start.min(), tree.end.max()) == (21, 25)


@given(
    steps=st.integers(2, 12), data=st.data(), edges=st.integers(1, 4), length=st.integers(1, 3),
    kernel=st.sampled_from(["flow", "cps"]), every=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60)
def test_wherever_the_branch_steps_slide_their_edges_fit(steps, data, edges, length, kernel, every):
    last = steps - edges * length - (kernel == "cps")  # whose step to the image has no noise
    if last < 0:
        return
    given = sorted(data.draw(st.sets(st.integers(0, last), min_size=1, max_size=3)))
    config = of(
        "mix_grpo", f"sampler.steps={steps}", f"sampler.stochastic_edges={edges}", f"sampler.edge_length={length}",
        f"sampler.kernel={kernel}", f"sampler.slide_every={every}", f"sampler.branch_steps={given}",
        "sampler.group_size=2", "sampler.eta=0.5",
    )  # fmt: skip
    places = last - given[-1] + 1
    for iteration in range(2 * places * every):
        tree = prompt_tree(config, iteration, 0, "x")
        moved = iteration // every % places
        assert branch_steps(config, iteration) == [step + moved for step in given]
        assert tree.end.max() <= steps - (kernel == "cps")
    trees = possible_trees(config)
    assert {tuple(tree.start) for tree in trees} <= {
        tuple(prompt_tree(config, iteration, 0, "x").start) for iteration in range(config.iterations)
    }


def test_a_fixed_method_has_the_same_tree_everywhere():
    config = of("g2rpo")
    assert prompt_tree(config, 0, 0, "a") is prompt_tree(config, 9, 3, "b")
    assert branch_steps(config) == [0, 1, 2, 3, 4]


def test_each_prompt_draws_its_branch_step_and_everybody_draws_the_same():
    config = of("flow_grpo_fast")
    drawn = [branch_steps(config, 3, slot, prompt) for slot, prompt in enumerate(PROMPTS)]
    assert all(len(steps) == 1 for steps in drawn)
    assert {step for (step,) in drawn} == {0, 1, 2, 3, 4}  # all of the list, none other
    assert drawn == [branch_steps(config, 3, slot, prompt) for slot, prompt in enumerate(PROMPTS)]
    for other in (
        [branch_steps(config, 4, slot, prompt) for slot, prompt in enumerate(PROMPTS)],
        [branch_steps(config, 3, slot + 1, prompt) for slot, prompt in enumerate(PROMPTS)],
        [branch_steps(of("flow_grpo_fast", "seed=1"), 3, slot, prompt) for slot, prompt in enumerate(PROMPTS)],
    ):
        assert other != drawn
    gaps = of("flow_grpo_fast", "sampler.branch_steps=[1, 6]")
    assert {step for prompt in PROMPTS for step in branch_steps(gaps, prompt=prompt)} == {1, 6}
    # another process, with another group: the draw depends on its key alone
    program = (
        "from tests.unit.test_plan import *; "
        "config = of('flow_grpo_fast', 'sampler.roots=5', 'rollout.members_per_unit=2'); "
        "print([branch_steps(config, 3, slot, prompt) for slot, prompt in enumerate(PROMPTS)])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(drawn)


def trained_starts(config, iteration=0, slot=0, prompt="x"):
    """The indices at which the trained edges of each child start."""
    tree = prompt_tree(config, iteration, slot, prompt)
    return [
        sorted({int(tree.start[edge]) for edge in subtree.edges if tree.trained[edge]}) for subtree in tree.subtrees
    ]


def test_each_child_draws_its_share_of_the_steps_that_may_be_trained():
    config = of("dance_grpo", "sampler.steps=16")
    drawn = trained_starts(config)
    assert [len(starts) for starts in drawn] == [9] * 12  # 60 % of 15
    assert len({tuple(starts) for starts in drawn}) > 6
    assert {start for starts in drawn for start in starts} == set(range(15))
    assert trained_starts(config) == drawn
    assert trained_starts(config, iteration=1) != drawn
    assert trained_starts(config, slot=1) != drawn
    assert trained_starts(config, prompt="y") != drawn
    assert trained_starts(of("dance_grpo", "sampler.steps=16", "seed=1")) != drawn
    # a child's draw does not depend on the size of its group
    assert trained_starts(of("dance_grpo", "sampler.steps=16", "sampler.group_size=5")) == drawn[:5]


@pytest.mark.parametrize(("share", "steps", "count"), [(0.6, 10, 5), (0.01, 10, 1), (1.0, 10, 9), (0.5, 4, 1)])
def test_the_share_is_rounded_down_but_there_is_always_a_step(share, steps, count):
    config = of("dance_grpo", f"sampler.trained_share={share}", f"sampler.steps={steps}")
    assert [len(starts) for starts in trained_starts(config)] == [count] * 12


def test_the_share_is_of_what_is_not_untrained_and_of_steps_not_of_edges():
    config = of("dance_grpo", "sampler.steps=12", "sampler.untrained=[0, 1, 2]", "sampler.trained_share=0.5")
    assert all(len(starts) == 4 and min(starts) > 2 for starts in trained_starts(config))
    config = of("branch_grpo", "sampler.trained_share=0.5")
    tree = prompt_tree(config, 0, 0, "x")
    for subtree, starts in zip(tree.subtrees, trained_starts(config), strict=True):
        assert len(starts) == 4  # of 9
        edges = np.array(subtree.edges)
        assert (tree.trained[edges] == np.isin(tree.start[edges], starts)).all()  # all the edges of a depth, or none


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("size", ["null", "1", "5", "1000"])
def test_the_units_of_a_prompt_cover_its_tree_once(method, size):
    config = of(method, f"rollout.members_per_unit={size}")
    tree, trunk = prompt_tree(config, 2, 1, "x"), TrunkUnit(2, 1, "x")
    units = list(branch_units(config, tree, trunk))
    of_step = config.sampler.roots * config.sampler.group_size
    assert all((unit.iteration, unit.slot, unit.prompt) == (2, 1, "x") for unit in units)
    assert len({unit.name for unit in units}) == len(units)
    covered = [
        (unit.branch_step, member)
        for unit in units
        for member in range(unit.first_member, unit.first_member + unit.members)
    ]
    assert covered == list(itertools.product(branch_steps(config, 2, 1), range(of_step)))
    assert max(unit.members for unit in units) == min(of_step, int(size) if size != "null" else of_step)
    parts = [trunk_part(tree), *(branch_part(tree, unit) for unit in units)]
    for kind, everything in (
        ("nodes", range(len(tree.index))),
        ("edges", range(len(tree.source))),
        ("leaves", range(len(tree.leaf))),
        ("images", tree.images),
    ):
        assert sorted(number for part in parts for number in getattr(part, kind)) == list(everything)
    assert sum(part.evaluations for part in parts) == tree.evaluations
    touched = {node for part in parts for node in part.touched}
    assert touched >= {*tree.source[tree.trained].tolist(), *tree.target[tree.trained].tolist()}


def test_a_unit_s_part_by_hand():
    """T 4, branch at 1, two children, granularities 1 and 2: paths 2, 3, 4 and 2, 3, 4 are one; anchor to the image."""
    config = of("g2rpo", "sampler.steps=4", "sampler.branch_steps=[1]", "sampler.group_size=2")
    tree = prompt_tree(config, 0, 0, "x")
    assert tree.index.tolist() == [0, 1, 2, 3, 4, *(2, 3, 4), *(2, 3, 4)]
    trunk, branch = trunk_part(tree), branch_part(tree, BranchUnit(0, 0, "x", 1, 1, 1))
    assert (trunk.nodes, trunk.edges, trunk.leaves, trunk.images) == ([0, 1, 2, 3, 4], [], [0], [4])
    assert (trunk.evaluations, trunk.touched) == (4, [1])
    assert (branch.nodes, branch.edges, branch.leaves, branch.images) == ([8, 9, 10], [1], [3, 4], [10])
    assert (branch.evaluations, branch.touched) == (2, [8])


def keys(config, *place):
    """Of all edges, by child and number of the edge in it; of the forward process, of all draws of images."""
    iteration, slot, prompt = place or (0, 0, "x")
    tree = prompt_tree(config, iteration, slot, prompt)
    where = BranchUnit(iteration, slot, prompt, 0, 0, 1)
    if config.learner.forward:
        drawn = itertools.product(enumerate(tree.trained_images), range(config.learner.draws))
        return {(root, draw): image_key(config, where, tree, node, draw) for (root, node), draw in drawn}
    return {
        (subtree.root, subtree.branch_step, subtree.child, edge - subtree.edges.start): edge_key(
            config, where, tree, edge
        )
        for subtree in tree.subtrees
        for edge in subtree.edges
    }


@pytest.mark.parametrize("method", method_names())
def test_noise_has_a_key_of_its_own_whatever_the_size_of_groups_and_units(method):
    found = keys(of(method))
    assert len(set(found.values())) == len(found)
    assert keys(of(method, "rollout.members_per_unit=3", "rollout.micro_batch=2")) == found
    group, roots = (getattr(of(method).sampler, name) for name in ("group_size", "roots"))
    group += 3 * (of(method).sampler.kernel != "ode")
    larger = keys(of(method, f"sampler.group_size={group}", f"sampler.roots={roots + 1}"))
    assert len(larger) > len(found)
    assert found.items() <= larger.items()
    for place in ((1, 0, "x"), (0, 1, "x"), (0, 0, "y")):
        assert not {*found.values()} & {*keys(of(method), *place).values()}
    assert not {*found.values()} & {*keys(of(method, "seed=1")).values()}


class Tokens(NamedTuple):
    """What of a model a number or FLUX.1's shift depends on."""

    image_tokens: int


def test_the_schedule_has_the_shift_that_is_given():
    assert sigma_grid(of("g2rpo", "sampler.steps=2").sampler, Tokens(64)).tolist() == [1.0, 0.75, 0.0]
    dynamic = of("g2rpo", "sampler.shift=dynamic").sampler
    assert sigma_grid(dynamic, Tokens(4096))[5] > sigma_grid(dynamic, Tokens(256))[5] > 0.5


def lines(config):
    return dict(line.split(":", 1) for line in describe_plan(config).splitlines())


def test_the_plan_of_g2rpo_by_hand():
    """The quickstart: T 10, steps 0..4, 8 children, granularities 1 and 2.

    Evaluations of a child, by step: paths (1..9) and (1, 3 ... 9): 9 + 4; (2..9) and (2, 3, 5, 7, 9): 8 + 3; (3..9) and
    (3, 5, 7, 9): 7 + 3; (4..9) and (4, 5, 7, 9): 6 + 2; (5..9) and (5, 7, 9): 5 + 2.
    """
    found = lines(load_config(None, ["rollout.members_per_unit=3"]))
    evaluations = 10 + 8 * (13 + 11 + 10 + 8 + 7)
    assert evaluations == 402
    assert "g2rpo: 1 roots, branch steps {0, 1, 2, 3, 4} (fixed), 8 children" in found["method"]
    assert found["a prompt"].strip() == "402 velocity evaluations, 81 images to score, 5 learner states"
    iteration = found["an iteration"]
    assert "8 prompts, 8 trunk units, 120 branch units of 3 members, 3216 evaluations" in iteration
    # 3 a state, and the old policy at the states of the four steps after the first
    assert "40 states forward and backward, as much as 152 evaluations" in iteration
    assert "40 iterations, 128640 evaluations and 6080 of updates" in found["the run"]
    # two actors do 1608 evaluations each while one rank does what counts as 152
    assert "0.095 learner ranks keep up with 2 rollout actors" in found["balance"]
    assert "the update is 5% of the work" in found["balance"]
    assert "39 evaluations, in batches of at most 16" in found["largest unit"]
    assert f"{8 * 81 * 32 * 32 * 3 / 2**20:.1f} MiB of images" in found["object store"]


def test_the_object_store_holds_what_an_iteration_leaves():
    """FLUX.1 at 720 px and SD3.5 at 512 px have latents of 518,400 and 262,144 bytes, pictures of 3 bytes a pixel."""
    flux, sd3 = load_config("flux_hps"), load_config("sd3_flow_grpo")
    assert object_store_bytes(flux) > 16 * (2 * 8 + 8 * 12) * 518_400 + 64 * 6 * 720 * 720 * 3
    assert object_store_bytes(sd3) > 48 * 24 * 10 * 262_144 + 48 * 24 * 512 * 512 * 3
    stale = sd3.model_copy(update={"rollout": sd3.rollout.model_copy(update={"max_staleness": 1})})
    assert object_store_bytes(stale) > object_store_bytes(sd3) + 48 * 24 * 10 * 262_144
    assert object_store_bytes(load_config()) < 1.5e9


def test_a_private_cluster_is_given_the_plan_s_object_store(monkeypatch, caplog):
    free = {"shm": 10**10}
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=free[path.rpartition("/")[2]]))
    assert _store_memory(5 * 10**9) == 5 * 10**9
    assert _store_memory(0) == 10**9
    assert not caplog.text
    assert _store_memory(5 * 10**10) == 8 * 10**9
    assert "the run may need 50.0 GB of object store, but /dev/shm has 10.0 GB free" in caplog.text
    free["shm"] = 64 * 2**20  # Docker's default: Ray takes the disk
    assert _store_memory(5 * 10**9) == 10**9


def test_the_plan_of_flow_grpo_by_hand():
    """T 10: 24 chains of 10 stochastic steps, 9 of them trained; each state has one edge, and one velocity."""
    found = lines(of("flow_grpo", "learner.gradient_checkpointing=true", "rollout.max_actors=6"))
    assert found["a prompt"].strip() == "240 velocity evaluations, 24 images to score, 216 learner states"
    assert "8 trunk units, 8 branch units of 24 members, 1920 evaluations" in found["an iteration"]
    updates = 8 * 216 * 4 + 4 * 216  # the second of two optimizer steps evaluates the old policy
    assert f"{8 * 216} states forward and backward, as much as {updates} evaluations" in found["an iteration"]
    assert "40 iterations, 76800 evaluations and 311040 of updates" in found["the run"]
    assert "24 learner ranks keep up with 6 rollout actors" in found["balance"]  # 6 · 7776 / 1920 = 24.3
    assert "the update is 80% of the work" in found["balance"]  # 7776 of 9696
    assert "216 evaluations" in found["largest unit"]  # the first velocity of each chain is the trunk unit's


def test_the_plan_of_what_moves_and_of_what_is_drawn():
    """Sliding: means over the run; drawn: whichever unit is the largest; subpaths: 1 + 2 velocities more a state."""
    found = lines(of("mix_grpo"))
    mean = (25 * (1 + 12 * 9) + 15 * (2 + 12 * 8)) / 40
    assert f"about {mean:g} velocity evaluations, 12 images to score, 37 learner states" in found["a prompt"]
    found = lines(of("flow_grpo_fast"))
    assert "240 velocity evaluations, 24 images to score, 48 learner states" in found["a prompt"]
    assert f"{24 * 9} evaluations" in found["largest unit"]  # of those who branch off at once
    assert learner_states(of("pave_grpo"), possible_trees(of("pave_grpo"))[0]) == 3 * 4
    assert learner_states(of("g2rpo"), possible_trees(of("g2rpo"))[0]) == 5
    for who, cost in (("rollout", 3 * 5 * 8), ("learner", 3 * 5 * 8 + 4 * 8)):
        config = of("g2rpo", f"learner.old_log_prob={who}")
        assert update_cost(config, possible_trees(config) * 8) == cost
    stale = of("g2rpo", "rollout.max_staleness=1")  # the policy that sampled is never the one that is updated
    assert update_cost(stale, possible_trees(stale) * 8) == 4 * 5 * 8
    found = lines(of("dance_grpo"))
    assert "109 velocity evaluations" in found["a prompt"]
    states = int(found["a prompt"].split()[7])
    assert 12 * 4 <= states <= 12 * 5  # 5 of 9 steps of 12 children, whose first states are one


def test_the_memory_of_what_is_trained_is_counted_with_zero_s_own_copies():
    """28 bytes a parameter: ZeRO's flat copy, the averaged gradient and AdamW's temporary one are beside Adam's 16."""
    trained = sum(math.prod(shape) for shape in lora_shapes(load_config().model, load_config().lora).values())
    for sets, each in (([], 28), (["rollout.max_staleness=1"], 32), (["method=diffusion_nft"], 32)):
        assert learner_memory(load_config(None, sets), 1, False)["adapter"] == each * trained


def test_of_several_rewards_the_sum_of_scores_is_normalised_as_one():
    """Flow-GRPO as released: the weighted sum of raw scores, its z-score within the prompt, over the std of all."""
    rewards = ["rewards.small.kind=jpeg_compressibility", "rewards.small.weight=0.5", "rewards.preference.weight=2"]
    config = of("flow_grpo", "sampler.roots=4", "credit.clip=100", *rewards, "credit.normalise=sum")
    assert of("flow_grpo", *rewards).credit.normalise == "each"
    rng, rollouts = np.random.default_rng(0), []
    for slot in range(2):
        tree = prompt_tree(config, 0, slot, "x")
        scores = np.array([[0.01], [10.0]]) * rng.standard_normal((2, 4)) + [[0.9], [-30.0]]
        rollouts.append(PromptRollout(0, slot, "x", tree, scores.astype(np.float32), None, None, ()))
    rollouts[0].scores[1, 2] = np.nan
    total = np.stack([2 * rollout.scores[0] + 0.5 * rollout.scores[1] for rollout in rollouts])
    expected = (total - np.nanmean(total, 1, keepdims=True)) / (np.nanstd(total) + 1e-4)
    made = with_credit_scores(rollouts, config)
    batch = BatchShape.of([made], config.learner)
    assert sum(step.edges for step in batch.steps) == (3 + 4) * len(set(range(10)) - set(config.sampler.untrained))
    for rollout, row in zip(made, expected, strict=True):
        advantage = edge_advantages(
            rollout.tree, rollout.scores, group="step", spread="batch", batch_std=batch.batch_std,
            reward_weights=config.credit_weights, clip=config.credit.clip,
        )  # fmt: skip
        for edge in np.flatnonzero(rollout.tree.trained):
            (leaf,) = rollout.tree.below(edge)
            assert advantage[edge] == pytest.approx(np.nan_to_num(row[leaf]), abs=1e-4)
