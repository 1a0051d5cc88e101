"""`auto`: what probes measure, what follows from it, and that a run does what its own record says."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from g2rpo_ray.algo.alignment import align, best_steps, coarsest_that_holds, of_all_steps, progress, standard_error
from g2rpo_ray.algo.completion import Choice, ladder
from g2rpo_ray.algo.credit import edge_advantages
from g2rpo_ray.algo.kernels import transition
from g2rpo_ray.algo.tree import Shape, plan_tree
from g2rpo_ray.commands.plan import describe_plan
from g2rpo_ray.config import load_config
from g2rpo_ray.learner.batch import BatchShape, RankMetrics
from g2rpo_ray.learner.loss import EdgeLoss, states_of
from g2rpo_ray.learner.probes import PROJECTION_SIZE, Probes, projected
from g2rpo_ray.models import lora_parameters
from g2rpo_ray.rollout.auto import Budget, decide, decision_in_words, evaluations
from g2rpo_ray.rollout.plan import prompt_tree
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import Branches, PromptRollout, Trunk
from tests.support.auto_runs import AUTO, auto
from tests.support.learner_groups import ITERATION, pipeline, policy, sample_rollouts, settings  # noqa: F401  a fixture


@pytest.mark.parametrize(
    ("branch_step", "steps", "largest", "layout", "strides"),
    [
        (0, 10, 8, "paper", (1, 2, 4, 8)),  # 9, 5, 3, 2 evaluations
        (0, 16, 8, "paper", (1, 2, 5)),  # 15, 8, 4
        (0, 16, 14, "paper", (1, 2, 5, 14)),  # and 2
        (0, 10, 3, "paper", (1, 2)),
        (0, 10, 1, "paper", (1,)),
        (3, 10, 8, "paper", (1, 3, 5)),  # 6, 3, 2; with stride 2 there would be 4
        (0, 16, 8, "authors", (1, 2, 4, 8)),  # 15, 8, 4, 2
        (8, 10, 8, "paper", (1,)),  # one step is left, and no cheaper way
        (9, 10, 8, "paper", (1,)),
    ],
)
def test_each_granularity_of_the_ladder_takes_half_of_the_one_before(branch_step, steps, largest, layout, strides):
    assert ladder(branch_step, steps, largest, layout) == strides


def gradients(n, signals, seed=0, d=64, noise=1.0):
    """[n, M, J, d]: of each step and stride a signal of this size along one direction, and noise that prompts share
    across strides in part, as completions of the same children do."""
    draw = np.random.default_rng(seed)
    signals = np.array(signals, float)  # [M, J]
    direction = np.eye(d)[0]
    shared = draw.standard_normal((n, signals.shape[0], 1, d))
    own = draw.standard_normal((n, *signals.shape, d))
    return signals[..., None] * direction + noise * (shared + own) / np.sqrt(2 * d)


def test_products_are_those_of_all_pairs_of_different_prompts():
    g = gradients(5, [[0.3, 0.2], [0.1, 0.4]])
    found = align(g, (0, 1), (1, 4))
    for row, left_out in enumerate([None, *range(5)]):
        kept = [i for i in range(5) if i != left_out]
        pairs = list(itertools.permutations(kept, 2))
        for step, place in itertools.product(range(2), range(2)):
            other = g[:, step, place]
            with_finest = np.mean([g[i, step, 0] @ other[j] for i, j in pairs])
            assert found.with_finest[row, step, place] == pytest.approx(with_finest)
            with_itself = np.mean([other[i] @ other[j] for i, j in pairs])
            assert found.with_itself[row, step, place] == pytest.approx(with_itself)
            assert found.square[row, step, place] == pytest.approx(np.mean([other[i] @ other[i] for i in kept]))
    # the jackknife of a mean is its standard error
    values = np.random.default_rng(1).standard_normal(9)
    means = np.array([values.mean(), *((values.sum() - value) / 8 for value in values)])
    assert standard_error(means) == pytest.approx(values.std(ddof=1) / 3)


COST = np.array([[10.0, 5, 2], [8, 4, 2]])


@pytest.mark.parametrize(
    ("signals", "n", "place"),
    [
        ([[0.5, 0.5, 0.5]] * 2, 32, 2),  # the coarsest points where the finest does
        ([[0.5, 0.5, 0.0]] * 2, 32, 1),  # it misleads
        ([[0.5, 0.0, 0.0]] * 2, 32, 0),  # and the middle one, too
        ([[0.5, 0.5, 0.4]] * 2, 32, 2),  # less signal, for less than half of the cost
        ([[0.5, 0.5, 0.0]] * 2, 7, 2),  # too few prompts tell nothing
        ([[0.0, 0.0, 0.0]] * 2, 32, 2),  # no signal at all: the cheapest
    ],
)
def test_a_finer_completion_is_taken_only_where_it_is_proved_better(signals, n, place):
    assert coarsest_that_holds(of_all_steps(align(gradients(n, signals), (0, 1), (1, 2, 4)), COST)) == place


def test_earlier_branch_steps_are_taken_only_where_they_are_proved_better():
    def chosen(*signals, n=48):
        found = align(gradients(n, [[signal] for signal in signals]), range(len(signals)), (1,))
        return best_steps(progress(found, np.ones((len(signals), 1)))[:, :, 0], 2)

    assert chosen(0.3, 0.3, 0.3, 0.3) == (2, 3)
    assert chosen(0.3, 1.0, 0.0, 0.3) == (1, 3)
    assert chosen(1.0, 1.0, 0.0, 0.0) == (0, 1)
    assert chosen(1.0, 1.0, 0.0, 0.0, n=7) == (2, 3)
    assert chosen(0.3) == (0,)


def test_of_a_list_of_strides_all_together_decide_on_the_steps():
    given = load_config(None, [AUTO[1], "sampler.strides=[1,2]"])
    assert given.sampler.probed_strides == (1, 0)
    found = align(gradients(32, [[0.3, 0.3]] * 3 + [[3.0, 3.0], [0.3, 0.3]]), given.sampler.probed_steps, (1, 0))
    cost = evaluations(given, found)
    both = given.sampler.model_copy(update={"branch_steps": (3,)})
    assert cost[3, 1] == plan_tree(both.shape()).completions + 3
    choice, _ = decide(given, found)
    assert choice == Choice((1, 2), (3, 4))


def test_steps_that_are_not_trained_are_no_candidates():
    sampler = auto("sampler.untrained=[3,4]").sampler
    assert sampler.all_branch_steps == sampler.probed_steps == (0, 1, 2)
    assert sampler.cheapest.branch_steps == (1, 2)
    last = load_config(None, [AUTO[0], "sampler.branch_steps=[0,8]", "sampler.untrained=[8]"]).sampler
    assert last.probed_steps == (0,)


def test_projected_gradients_keep_inner_products_whatever_they_are_cut_into():
    torch.manual_seed(0)
    g, h = torch.randn(2, 10_000) + 0.5
    exact, noise = float(g @ h), float(g.norm() * h.norm()) / 4096**0.5
    sketched = [projected([x], [10_000], 4096) for x in (g, h)]
    assert float(sketched[0] @ sketched[1]) == pytest.approx(exact, abs=4 * noise)
    assert noise < exact / 4
    pieces = projected([g[:777].view(7, 111), g[777:]], [777, 9223], 4096)
    assert torch.allclose(pieces, sketched[0], atol=1e-5)
    with_zeros = projected([torch.cat([g[:777], torch.zeros(100), g[777:]])], [10_100], 4096)
    assert torch.allclose(projected([g[:777], None, g[777:]], [777, 100, 9223], 4096), with_zeros, atol=1e-5)


def probe(seed, noise=0.0, scale=(1.0, 1.0), rewards=1, strides=(1, 2)):
    """Four children at steps 0 and 1 of 6; coarse scores are the finest with noise added."""
    tree = plan_tree(Shape(6, branch_steps=(0, 1), children=4, strides=strides, untrained=(1,), anchors=True))
    draw = np.random.default_rng(seed)
    scores = draw.standard_normal((rewards, len(tree.leaf)))
    for subtree in tree.subtrees:
        finest = scores[:, subtree.leaves.start] * scale[subtree.branch_step]
        for place in subtree.leaves:
            extra = noise * draw.standard_normal(rewards) if tree.tag[place] else 0
            scores[:, place] = finest + extra
    return tree, scores.astype(np.float32)


def test_gradients_of_a_probe_are_those_of_a_plain_program(pipeline):
    sampler = {"strides": "auto", "branch_steps": "auto", "auto": {"every": 1, "prompts": 1, "steps": 1}}
    config = settings(pipeline, sampler=sampler, lora_initial=None)
    rollout, other = sample_rollouts(config, 2)
    rollout = replace(rollout, scores=np.nan_to_num(rollout.scores))  # two are missing
    tree, strides = rollout.tree, config.sampler.all_strides
    assert (tree.probe, other.tree.probe, tree.strides) == (True, False, strides)
    assert set(tree.start) == {0, 1, 2} > set(tree.start[tree.trained])
    model = policy(config)
    with torch.no_grad():
        for parameter in lora_parameters(model.transformer).values():  # else all of lora_A has no gradient
            parameter += 0.05
    sigmas, lora = sigma_grid(config.sampler, model), lora_parameters(model.transformer)
    loss = EdgeLoss(config, model, model.transformer, sigmas, SimpleNamespace(old=None))
    found = Probes(config, loss, lora, None)._gradients(rollout, BatchShape.of([[rollout]], config.learner))
    latents = {node: x for part in rollout.branches for node, x in zip(part.nodes.tolist(), part.latents, strict=True)}
    latents |= dict(zip(tree.branch_points.tolist(), rollout.trunk.latents, strict=True))
    whole = replace(tree, trained=np.ones_like(tree.trained))
    for step, place in itertools.product(range(3), range(len(strides))):
        alone = [float(place == row) for row in range(len(strides))]
        advantage = torch.tensor(edge_advantages(
            whole, rollout.scores, group="siblings", spread="group", reward_weights=config.credit_weights,
            granularity_weights=alone, clip=config.credit.clip,
        ))  # fmt: skip
        edges = np.flatnonzero(tree.start == step)
        x = torch.tensor(latents[int(tree.source[edges[0]])])[None]
        v = model.velocity(x, sigmas[[step]].to(x), model.condition([rollout.embedding]))
        after = torch.tensor(np.stack([latents[int(node)] for node in tree.target[edges]]))
        there = np.isfinite(advantage[edges].numpy())
        moved = transition("flow", x, v, sigmas, step, config.sampler.eta, next_index=step + 1, next_x=after)
        objective = (torch.nan_to_num(advantage[edges]).float() * moved.log_prob).sum() / len(edges)
        assert there.any()
        expected = projected(
            torch.autograd.grad(objective, list(lora.values()), allow_unused=True),
            [parameter.numel() for parameter in lora.values()], PROJECTION_SIZE,
        )  # fmt: skip
        assert expected.norm() > 0
        assert torch.allclose(found[step, place], expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))


def test_a_probe_grows_all_and_trains_what_the_others_do():
    config = auto("sampler.auto.every=4", "sampler.auto.prompts=1")
    choice = Choice((4,), (0, 2))
    probing, other = (prompt_tree(config, 4, slot, "x", choice) for slot in (0, 1))
    assert (probing.strides, other.strides) == ((1, 2, 4, 8), (4,))
    assert sorted({s.branch_step for s in probing.subtrees}) == [0, 1, 2, 3, 4]
    assert sorted({s.branch_step for s in other.subtrees}) == [0, 2]
    assert set(probing.start[probing.trained]) == set(other.start[other.trained]) == {0, 2}
    assert prompt_tree(config, 5, 0, "x", choice) is other
    begins = prompt_tree(config, 1, 0, "x")
    assert (begins.strides, sorted({s.branch_step for s in begins.subtrees})) == ((8,), [3, 4])
    assert prompt_tree(load_config(), 0, 0, "x", None).strides == (1, 2)


def test_in_a_probe_the_finest_images_give_the_advantage():
    config = auto("sampler.steps=6")
    tree, scores = probe(0, noise=2.0)
    latents = {"nodes": np.arange(len(tree.index)), "latents": np.zeros((len(tree.index), 1, 1), np.float32)}
    edges = {"edges": np.arange(len(tree.source)), "log_prob": np.zeros(len(tree.source), np.float32)}
    points = np.zeros((len(tree.branch_points), 1, 1), np.float32)
    rollout = PromptRollout(0, 0, "x", tree, scores, None, Trunk(points, points), (Branches(**latents, **edges),))
    batch = BatchShape.of([[rollout]], config.learner)
    (state,) = [s for states in states_of(config, [rollout], batch, RankMetrics()).values() for s in states]
    finest = torch.tensor(scores[0, tree.tag == 0][:4]).double()
    assert state.start == 0  # step 1 is not trained
    assert torch.allclose(state.advantage.double(), (finest - finest.mean()) / finest.std(), atol=1e-5)


@pytest.mark.parametrize("staleness", [0, 1])
def test_choices_follow_from_what_is_known_when_an_iteration_begins(staleness):
    """With and without a checkpoint after each iteration, the choices are the same."""
    config = auto("sampler.auto.every=3", "sampler.group_size=3", f"rollout.max_staleness={staleness}")
    through, made, words = Budget(config), [], {}
    resumed, (steps, strides) = Budget(config), (config.sampler.probed_steps, config.sampler.all_strides)
    for iteration in range(14):
        choice = through.choice(iteration)
        assert resumed.choice(iteration) == choice
        assert through.choice(iteration + staleness) == resumed.choice(iteration + staleness)
        made.append(choice)
        better = np.full((len(steps), len(strides)), 0.2)
        better[(iteration // 3) % 3, (iteration // 3) % 2] = 2.0  # another step and stride after each probe
        alignment = None if iteration % 3 else align(gradients(32, better, iteration), steps, strides)
        decision = through.learn(iteration, alignment)
        assert resumed.learn(iteration, alignment) == decision
        assert (decision is None) == (iteration % 3 > 0)
        if decision:
            words[decision.since] = decision_in_words(config, decision)
        resumed = Budget(config, json.loads(json.dumps(resumed.state)))
    changed = [at for at in range(1, 14) if made[at] != made[at - 1]]
    assert len(changed) > 2
    assert {(at - 1 - staleness) % 3 for at in changed} == {0}  # each after a probe, when its gradients are there
    assert made[0] == made[staleness] == config.sampler.cheapest
    assert (
        f"from iteration {changed[0] + 1} on, by 32 probed prompts: λ={made[changed[0]].strides[0]}, "
        in words[changed[0]]
    )
    assert not Budget(config, {**through.state, "rule": "another"}).state["decisions"]
    other = auto("sampler.auto.every=3", "sampler.auto.largest=4", f"rollout.max_staleness={staleness}")
    assert Budget(other, through.state).choice(20) == other.sampler.cheapest  # of another ladder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=flow_grpo", AUTO[0]], "ODE steps begin only at index 10 of 10"),
        (["method=dance_grpo", AUTO[0]], "ODE steps begin only at index 9 of 10"),
        (["method=branch_grpo", AUTO[1]], "branch_steps: auto given, which needs stochastic_edges=1"),
        (["method=mix_grpo", AUTO[1]], "branch_schedule=fixed; they are 4 and slide"),
        (["method=awm", AUTO[0]], "strides: auto given, but kernel=ode"),
        (["method=diffusion_nft", AUTO[1]], "branch_steps: auto given, but kernel=ode"),
        ([AUTO[0], "sampler.auto.largest=1"], "up to auto.largest=1"),
        ([AUTO[0], "learner.zero_stage=3"], "learner.zero_stage: 3 given, but `auto`"),
        ([AUTO[1], "learner.compile=true"], "learner.compile: true given, but `auto`"),
        ([AUTO[0], "learner.objective=nft"], "learner.objective: nft given, but `auto`"),
        ([AUTO[0], "credit.granularity_weights=[1,2]"], "credit.granularity_weights: given, but sampler.strides=auto"),
        (["sampler.strides=automatic"], "sampler.strides: 'automatic' given"),
    ],
)
def test_auto_is_refused_where_it_means_nothing(overrides, said):
    with pytest.raises(ValueError, match="auto") as error:
        load_config(None, overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["g2rpo", "e_grpo", "tempflow_grpo", "pave_grpo", "mix_grpo", "flow_grpo_fast"])
def test_the_plan_tells_the_range(method):
    config = load_config(None, [f"method={method}", AUTO[0], "iterations=7", "sampler.auto.every=3"])
    (line,) = [line for line in describe_plan(config).splitlines() if line.startswith("auto:")]
    low, high = (float(word.strip(".")) for word in line.split("the run: ")[1].split()[:3:2])
    for choice in (config.sampler.cheapest, config.sampler.costliest, Choice((2,), config.sampler.all_branch_steps)):
        prompts = range(config.data.prompts_per_iteration)
        trees = [prompt_tree(config, iteration, slot, "x", choice) for iteration in range(7) for slot in prompts]
        slack = 1.1 if config.sampler.branch_schedule == "draw" else 1  # there the plan has means
        assert low / slack <= sum(tree.evaluations for tree in trees) <= high * slack


@pytest.mark.parametrize("staleness", [0, 1])
def test_declines_halve_the_stride_for_what_begins_after_them(staleness):
    sets = ["sampler.strides=[8]", "sampler.branch_steps=[3, 4]", "evaluation.on_decline=finer"]
    config = load_config(None, [*sets, f"rollout.max_staleness={staleness}"])
    budget = Budget(config)
    assert budget.choice(99) is None
    assert budget.decline(5) == 4
    assert budget.choice(4 + staleness) is None
    assert budget.choice(5 + staleness).strides == (4,)
    assert prompt_tree(config, 9, 0, "x", budget.choice(9)).strides == (4,)
    assert sorted({s.branch_step for s in prompt_tree(config, 9, 0, "x", budget.choice(9)).subtrees}) == [3, 4]
    resumed = Budget(config, json.loads(json.dumps(budget.state)))
    assert [resumed.decline(done) for done in (7, 8, 9)] == [2, 1, None]
    assert [resumed.choice(done + staleness).strides[0] for done in (5, 6, 7, 8, 50)] == [4, 4, 2, 1, 1]
    assert budget.metrics(9, None) == {"choice/stride": 4}
    otherwise = load_config(None, [*sets[:2], f"rollout.max_staleness={staleness}"])
    assert Budget(otherwise, budget.state).choice(9) is None  # a run from this checkpoint that asks for nothing


@pytest.mark.parametrize("given", ["[1]", "[1, 2]", "auto"])
def test_an_answer_to_declines_needs_a_stride_to_make_finer(given):
    with pytest.raises(ValueError, match=r"^evaluation.on_decline: finer given"):
        load_config(None, [f"sampler.strides={given}", "evaluation.on_decline=finer"])
    with pytest.raises(ValueError, match=r"^evaluation.on_decline: rewind given, but with rollout.max_staleness"):
        load_config(None, ["sampler.strides=[8]", "evaluation.on_decline=rewind", "rollout.max_staleness=1"])
