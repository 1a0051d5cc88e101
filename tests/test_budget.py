"""`auto`: what probes measure, what follows from it, and that a run does what its own record says."""

import json
import signal

import numpy as np
import pytest
import torch

from g2rpo_ray.algo import Choice, Measured, Shape, agreeing, ladder, mattering, measure, plan_tree, pooled
from g2rpo_ray.config import load_config
from g2rpo_ray.launch.plan import describe_plan
from g2rpo_ray.rollout.budget import Budget, decide, in_words
from g2rpo_ray.rollout.plan import prompt_tree
from g2rpo_ray.types import Branches, PromptRollout, Trunk
from learner.batch import BatchShape, RankMetrics
from learner.loss import states_of
from tests.runs import finish, kill_at_work, lora, metrics, same_lora, start, wait_for_iteration

AUTO = ("sampler.strides=auto", "sampler.branch_steps=auto")


def auto(*overrides):
    return load_config(None, [*AUTO, *overrides])


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


@pytest.mark.parametrize(
    ("agreement", "stride"),
    [
        ({2: 0.99, 4: 0.93, 8: 0.81}, 8),
        ({2: 0.99, 4: 0.93, 8: 0.79}, 4),
        ({2: 0.99, 4: 0.8, 8: 0.5}, 4),  # as much as is wanted
        ({2: 0.99, 4: 0.79, 8: 0.5}, 2),
        ({2: 0.7, 4: 0.79, 8: -0.5}, 1),
        ({2: 0.7, 8: 0.9}, 8),  # the cheapest that agrees, whatever lies between
        ({}, 1),
    ],
)
def test_the_cheapest_granularity_that_agrees_is_chosen(agreement, stride):
    assert agreeing(agreement, 0.8) == stride


@pytest.mark.parametrize(
    ("spread", "steps"),
    [
        ({0: 1.0, 1: 0.6, 2: 0.5, 3: 0.49}, (0, 1, 2)),
        ({0: 0.4, 1: 0.8, 2: 0.3}, (0, 1)),  # a share of the largest, wherever it is
        ({0: 0.0, 1: 0.0}, (0, 1)),  # nothing tells them apart
        ({}, ()),
    ],
)
def test_the_steps_whose_noise_matters_are_chosen(spread, steps):
    assert mattering(spread, 0.5) == steps


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
    return tree, torch.tensor(scores, dtype=torch.float32)


def test_agreement_and_spread_of_probes_are_as_numpy_has_them():
    probes = [probe(seed, noise=1.0, scale=(1, 3), rewards=2) for seed in range(3)]
    weights = [1.0, 3.0]
    found = measure(probes, group="siblings", weights=weights)
    correlations, stds = [], {0: [[], []], 1: [[], []]}
    for tree, scores in probes:
        for step in (0, 1):  # at the step that is not trained now, too
            places = [s.leaves for s in tree.subtrees if s.branch_step == step]
            by_tag = [scores[:, [there[tag] for there in places]].double().numpy() for tag in (0, 1)]
            normal = [(part - part.mean(1, keepdims=True)) / part.std(1, ddof=1, keepdims=True) for part in by_tag]
            mixed = [weights @ part for part in normal]
            correlations.append(np.corrcoef(*mixed)[0, 1])
            for reward in (0, 1):
                stds[step][reward].append(by_tag[0][reward].std(ddof=1))
    assert found.agreement == {2: pytest.approx(np.mean(correlations), abs=1e-6)}
    means = np.array([[np.mean(stds[step][reward]) for reward in (0, 1)] for step in (0, 1)])
    shares = (means / means.max(0)) @ weights / 4
    assert found.spread == {step: pytest.approx(shares[step], abs=1e-6) for step in (0, 1)}
    late = measure(probes, group="siblings", weights=weights, steps=(1,))
    assert late.agreement == {2: pytest.approx(np.mean(correlations[1::2]), abs=1e-6)}
    assert late.spread == found.spread


def test_what_a_probe_cannot_tell_stays_as_it_was_known():
    tree, scores = probe(0, noise=0.5)
    known = measure([(tree, scores)], group="siblings", weights=[1.0])
    nothing = measure([(tree, torch.full_like(scores, torch.nan))], group="siblings", weights=[1.0])
    assert nothing == Measured({}, {})
    assert pooled(known, nothing) == known
    assert pooled(None, nothing) == nothing
    then = pooled(known, Measured({2: 0.0, 4: 0.5}, {}))
    assert then.agreement == {2: known.agreement[2] / 2, 4: 0.5}
    choice, _ = decide(auto("sampler.steps=6"), None, [(tree, torch.full_like(scores, torch.nan))])
    assert choice == Choice((1,), (0, 1, 2))  # the finest, from all steps


def test_a_coarse_choice_gives_way_when_agreement_falls():
    config = auto("sampler.steps=6", "sampler.auto.spread=0.3")
    choice, measured = decide(config, None, [probe(0, scale=(1, 0.1))])
    assert choice == Choice((2,), (0,))
    for seed in range(1, 4):
        choice, measured = decide(config, measured, [probe(seed, noise=3.0)])
    assert choice == Choice((1,), (0, 1))
    assert measured.agreement[2] < 0.8
    assert 0.3 < measured.spread[1] < measured.spread[0]


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
    assert (begins.strides, sorted({s.branch_step for s in begins.subtrees})) == ((8,), [0, 1, 2, 3, 4])
    assert prompt_tree(load_config(), 0, 0, "x", None).strides == (1, 2)


def test_in_a_probe_the_finest_images_give_the_advantage():
    config = auto("sampler.steps=6", "sampler.auto.spread=0")
    tree, scores = probe(0, noise=2.0)
    latents = {"nodes": np.arange(len(tree.index)), "latents": np.zeros((len(tree.index), 1, 1), np.float32)}
    edges = {"edges": np.arange(len(tree.source)), "log_prob": np.zeros(len(tree.source), np.float32)}
    points = np.zeros((len(tree.branch_points), 1, 1), np.float32)
    rollout = PromptRollout(
        0, 0, "x", tree, scores.numpy(), None, Trunk(points, points), (Branches(**latents, **edges),)
    )
    batch = BatchShape.of([[rollout]], config.learner)
    (state,) = [s for states in states_of(config, [rollout], batch, RankMetrics()).values() for s in states]
    finest = scores[0, tree.tag == 0][:4].double()
    assert state.start == 0  # step 1 is not trained
    assert torch.allclose(state.advantage.double(), (finest - finest.mean()) / finest.std(), atol=1e-5)


def probed(config, iteration, choice, seed):
    """The prompts of an iteration, with scores that are drawn."""
    made = []
    for slot in range(3):
        tree = prompt_tree(config, iteration, slot, "x", choice)
        scores = np.random.default_rng([seed, iteration, slot]).standard_normal((1, len(tree.leaf)))
        made.append(PromptRollout(iteration, slot, "x", tree, scores.astype(np.float32), None, None, ()))
    return made


@pytest.mark.parametrize("staleness", [0, 1])
def test_choices_follow_from_what_is_known_when_an_iteration_begins(staleness):
    """With and without a checkpoint after each iteration, the choices are the same."""
    bounds = ("sampler.auto.every=3", "sampler.auto.agreement=0.1", "sampler.auto.spread=0.8", "sampler.group_size=3")
    config = auto(*bounds, f"rollout.max_staleness={staleness}")
    through, made, words = Budget(config), [], {}
    resumed = Budget(config)
    for iteration in range(14):
        choice = through.choice(iteration)
        assert resumed.choice(iteration) == choice
        assert through.choice(iteration + staleness) == resumed.choice(iteration + staleness)
        made.append(choice)
        prompts = probed(config, iteration, choice, 7)
        decision = through.learn(iteration, prompts)
        assert resumed.learn(iteration, prompts) == decision
        assert (decision is None) == (iteration % 3 > 0)
        if decision:
            words[decision.since] = in_words(config, decision)
        resumed = Budget(config, json.loads(json.dumps(resumed.state)))
    changed = [at for at in range(1, 14) if made[at] != made[at - 1]]
    assert len(changed) > 2
    assert {(at - 1 - staleness) % 3 for at in changed} == {0}  # each after a probe, when its scores are there
    assert made[0] == made[staleness] == config.sampler.first_choice
    assert f"from iteration {changed[0] + 1} on: λ={made[changed[0]].strides[0]}, for " in words[changed[0]]
    other = auto("sampler.auto.every=3", "sampler.auto.largest=4", f"rollout.max_staleness={staleness}")
    assert Budget(other, through.state).choice(20) == other.sampler.first_choice  # of another ladder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=flow_grpo", AUTO[0]], "stochastic edges reach index 10 of 10"),
        (["method=dance_grpo", AUTO[0]], "stochastic edges reach index 9 of 10"),
        (["method=branch_grpo", AUTO[1]], "branch_steps: auto given, which needs stochastic_edges=1"),
        (["method=mix_grpo", AUTO[1]], "branch_schedule=fixed; these are 4 and slide"),
        (["method=awm", AUTO[0]], "strides: auto given, but with kernel=ode"),
        (["method=diffusion_nft", AUTO[1]], "branch_steps: auto given, but with kernel=ode"),
        ([AUTO[0], "sampler.auto.largest=1"], "up to auto.largest=1"),
        ([AUTO[0], "credit.granularity_weights=[1,2]"], "sampler.strides=auto has one at a time"),
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
    for choice in (config.sampler.cheapest, config.sampler.dearest, Choice((2,), config.sampler.all_branch_steps)):
        prompts = range(config.data.prompts_per_iteration)
        trees = [prompt_tree(config, iteration, slot, "x", choice) for iteration in range(7) for slot in prompts]
        slack = 1.1 if config.sampler.branch_schedule == "draw" else 1  # there the plan has means
        assert low / slack <= sum(tree.evaluations for tree in trees) <= high * slack


CHOOSING = {
    "iterations": 5, "sampler__strides": "auto", "sampler__branch_steps": "auto", "sampler__auto__every": 2,
    "sampler__auto__prompts": 1, "sampler__auto__agreement": 0.9, "sampler__auto__spread": 0.9,
    "learner__lr": 0.01, "data__prompts_per_iteration": 3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_picks_what_its_record_says_on_any_number_of_actors_after_a_stop_and_a_loss(alone, tmp_path):
    whole, settings = alone(**CHOOSING), {"rollout__max_actors": 2, **CHOOSING}
    process = start(tmp_path, "two", **settings)
    wait_for_iteration(process, tmp_path, "two", 2)
    process.send_signal(signal.SIGTERM)
    finish(process, status=130)
    assert len(metrics(tmp_path, "two")) < 6
    process = start(tmp_path, "two", **settings)
    wait_for_iteration(process, tmp_path, "two", 3)
    kill_at_work(process, "LearnerRank.update")
    assert "learner lost" in finish(process)
    same_lora(lora(tmp_path, "two"), whole.result().lora)
    lines = metrics(tmp_path, "two")[1:]
    step = "choice/step/"
    for before, line, after in zip([{}, *lines], lines, [*lines[1:], {}], strict=False):
        agreement, spread = (
            {int(k.rsplit("/", 1)[1]): v for k, v in line.items() if k.startswith(f"choice/{kind}/")}
            for kind in ("agreement", "spread")
        )
        assert bool(spread) == (line["iteration"] % 2 == 1)
        if spread and after:
            assert after["choice/stride"] == agreeing(agreement, 0.9)
            assert tuple(s for s in (0, 1) if after[f"{step}{s}"]) == mattering(spread, 0.9)
        elif before and after:
            assert after["choice/stride"] == line["choice/stride"]
    assert len({(line["choice/stride"], line[f"{step}0"], line[f"{step}1"]) for line in lines}) > 1
    assert "auto, from iteration 2 on: λ=" in (tmp_path / "two" / "run.log").read_text()
    for line, alike in zip(lines, whole.result().lines, strict=True):
        chosen, alone_chosen = ({k: v for k, v in of.items() if k.startswith("choice/")} for of in (line, alike))
        assert chosen == alone_chosen
