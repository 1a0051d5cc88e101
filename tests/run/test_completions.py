"""Completions computed otherwise than the policy: scores change by rounding, log-probabilities not by a bit."""

import sys

import numpy as np
import pytest
import torch

from g2rpo_ray.commands.plan import describe_plan
from g2rpo_ray.config import load_config
from g2rpo_ray.methods import method_names
from g2rpo_ray.models import FlowModel, add_lora, fold_lora, lora_parameters, quantize
from g2rpo_ray.models.estimate import rollout_memory
from g2rpo_ray.models.quantized import GROUP, MULTIPLE, is_quantized
from g2rpo_ray.preflight import check_files
from g2rpo_ray.rollout.cost import iteration_cost
from g2rpo_ray.rollout.plan import branch_units, exact_units, prompt_tree, trunk_part
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import SampleUnit, TrunkUnit
from tests.support.quantised import INT8

REFUSED = {"branch_grpo", "dance_grpo", "flow_grpo", "flow_grpo_fast", "mix_grpo"}


def config_of(*sets):
    size = ["sampler.steps=5", "sampler.branch_steps=[0, 2]", "sampler.group_size=4", "lora.rank=4"]
    return load_config(None, [*size, *sets])


def transformer():
    model = FlowModel.load(load_config().model, "cpu", transformer=True)
    add_lora(model.transformer, load_config().lora, seed=0)
    fold_lora(model.transformer)
    return model.transformer


LARGEST = {"int8": 0.06, "int8_weights": 0.06, "float8_weights": 0.06, "int4_weights": 0.2, "nvfp4_weights": 0.2}


@pytest.mark.parametrize("kind", LARGEST)
def test_blocks_are_quantised_and_the_lora_and_what_is_around_them_is_not(kind):
    torch.manual_seed(0)
    subject = transformer()
    multiple = GROUP if kind == "int4_weights" else MULTIPLE
    names = {name for name, module in subject.named_modules() if is_quantized(module, name, multiple)}
    x = torch.randn(3, next(m for n, m in subject.named_modules() if n in names).in_features)
    before = {
        name: subject.get_submodule(name)(x) for name in names if subject.get_submodule(name).in_features == x.shape[1]
    }
    kept = {name: p.clone() for name, p in subject.named_parameters() if name.removesuffix(".weight") not in names}
    quantize(subject, kind, "cpu")
    errors = [float((subject.get_submodule(name)(x) - y).norm() / y.norm()) for name, y in before.items()]
    assert all(0 < error < LARGEST[kind] for error in errors)
    assert len(names) > 10
    assert not {name for name in names if "lora" in name}
    after = dict(subject.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in kept.items())
    assert lora_parameters(subject).keys() == lora_parameters(transformer()).keys()


@pytest.fixture(scope="module")
def units():
    """What a prompt's units give, exact and with completions in int8, with a LoRA that has moved; by setting."""
    found = {}
    for kind in ("none", "int8"):
        config = config_of(f"rollout.completions.quantization={kind}")
        sampler = Sampler(config)
        generator = torch.Generator().manual_seed(0)
        state = {
            name: 0.05 * torch.randn(p.shape, generator=generator).numpy()
            for name, p in lora_parameters(sampler._model.transformer).items()
        }
        sampler.load_weights(state)
        (embedding,) = FlowModel.load(config.model, "cpu", text_encoders=True).encode(["a red circle"])
        unit = TrunkUnit(0, 0, "a red circle")
        tree = prompt_tree(config, 0, 0, unit.prompt)
        trunk, anchors = sampler.trunk(unit, embedding)
        branches = [sampler.branch(branch, embedding, trunk) for branch in branch_units(config, tree, unit)]
        exact = [sampler.branch(branch, embedding, trunk) for branch in exact_units(config, tree, unit)]
        found[kind] = trunk, anchors, branches, exact, sampler.sample(SampleUnit(unit.prompt, (0,)), embedding)
    return found


def test_log_probabilities_and_all_that_is_trained_on_are_the_same_bits(units):
    for (mine, images), (theirs, other_images) in zip(units["int8"][2], units["none"][2], strict=True):
        for name in ("nodes", "latents", "edges", "log_prob"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
        assert not np.array_equal(images, other_images)
        assert np.abs(images.astype(float) - other_images).mean() < 3  # of 255


def test_trunks_held_out_samples_and_probes_are_exact(units):
    int8, none = units["int8"], units["none"]
    assert np.array_equal(int8[0].velocities, none[0].velocities)
    assert np.array_equal(int8[1], none[1])
    assert np.array_equal(int8[4], none[4])
    assert len(int8[3]) == len(none[2])
    assert not none[3]
    for (_, mine), (_, theirs) in zip(int8[3], none[2], strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("method", method_names())
def test_a_plan_whose_likelihood_would_rest_on_them_is_refused_with_its_share(method):
    sets = [f"method={method}", "rollout.completions.quantization=int8"]
    if method in REFUSED:
        with pytest.raises(ValueError, match=r"^rollout.completions: .* \d+% of the velocities"):
            load_config(None, sets)
    else:
        assert load_config(None, sets).rollout.completions.differ


def test_a_run_learns_from_them_and_tells_how_like_they_are(alone):
    lines = alone(**INT8, rollout__completions__probe_every=2).result().lines
    assert all(line["learner/ratio_initial_max_dev"] == 0 for line in lines)
    assert all(line["mismatch/velocity"] < 1e-6 for line in lines)
    told = [line.get("signal/agreement/completions") for line in lines]
    assert told[1] is None
    assert 0.8 < told[0] <= 1 >= told[2] > 0.8
    exact = alone().result().lines
    below = 4 * ((4 + 1) + 2)  # evaluations of a prompt's branches: see test_system
    assert [
        line["rollout/evaluations"] - other["rollout/evaluations"] for line, other in zip(lines, exact, strict=True)
    ] == [below, 0, below]


def test_the_cost_of_an_iteration_has_its_probes():
    plain, both = config_of("rollout.completions.probe_prompts=1"), config_of("rollout.completions.quantization=int8")
    tree = prompt_tree(plain, 0, 0, "")
    below = tree.evaluations - trunk_part(tree).evaluations
    costs = [[iteration_cost(config, [""] * 64, iteration) for iteration in (0, 1)] for config in (plain, both)]
    assert costs[1] == [costs[0][0] + below, costs[0][1]]
    assert "completions:" not in describe_plan(plain)
    assert f"completions:   {below / tree.evaluations:.1%} of the velocities, in int8" in describe_plan(both)


def test_their_weights_are_in_the_estimate_of_an_actor_s_memory():
    weights = {
        kind: rollout_memory(config_of(f"rollout.completions.{kind}"))["weights"]
        for kind in ("quantization=none", "quantization=nvfp4", "quantization=int8", "compile=true")
    }
    assert list(weights.values()) == sorted(set(weights.values()))


APART = ("rollout.completions.max_actors=3", "rollout.completions.resources={CPU: 1}")


def test_actors_of_their_own_hold_one_copy_of_the_weights_and_so_do_rollout_actors():
    one, beside = (config_of(*sets) for sets in ((), ("rollout.completions.quantization=int8",)))
    apart = config_of(*APART, "rollout.completions.quantization=int8")
    both, exact, cheap = rollout_memory(beside), rollout_memory(apart), rollout_memory(apart, "completions")
    assert exact == rollout_memory(one)
    assert cheap["weights"] < exact["weights"] < both["weights"]
    same = rollout_memory(config_of(*APART), "completions")
    assert same == exact
    few = config_of(*APART, "rollout.completions.micro_batch=1")
    assert rollout_memory(few, "completions")["velocity"] < same["velocity"]
    assert rollout_memory(few)["velocity"] == exact["velocity"]


def test_an_actor_of_their_own_gives_the_bits_of_one_that_computes_all():
    config = config_of(*APART, "rollout.completions.quantization=int8")
    (embedding,) = FlowModel.load(config.model, "cpu", text_encoders=True).encode(["a red circle"])
    unit, tree = TrunkUnit(0, 0, "a red circle"), prompt_tree(config, 0, 0, "a red circle")
    together, exact, cheap = (Sampler(config, units=units) for units in ("all", "exact", "completions"))
    (trunk, _), (again, _) = (sampler.trunk(unit, embedding) for sampler in (together, exact))
    assert np.array_equal(trunk.velocities, again.velocities)
    for own, units in ((cheap, branch_units), (exact, exact_units)):
        for branch in units(config, tree, unit):
            (_, images), (_, others) = (sampler.branch(branch, embedding, trunk) for sampler in (together, own))
            assert np.array_equal(images, others)


def test_their_actors_may_have_no_gpu_where_rollout_actors_have_one():
    mixed = config_of(*APART, "rollout.resources={GPU: 1}")
    assert (mixed.rollout.device, mixed.rollout.completions.device) == ("cuda", "cpu")
    (embedding,) = FlowModel.load(mixed.model, "cpu", text_encoders=True).encode(["a red circle"])
    unit, tree = TrunkUnit(0, 0, "a red circle"), prompt_tree(mixed, 0, 0, "a red circle")
    on_cpu, completing = Sampler(config_of(*APART)), Sampler(mixed, units="completions")
    trunk, _ = on_cpu.trunk(unit, embedding)
    for branch in branch_units(mixed, tree, unit):
        (_, images), (_, others) = (sampler.branch(branch, embedding, trunk) for sampler in (on_cpu, completing))
        assert np.array_equal(images, others)


def test_a_micro_batch_of_their_own_changes_no_log_probability():
    found = []
    for batch in (1, 3):
        config = config_of(f"rollout.completions.micro_batch={batch}")
        sampler = Sampler(config)
        (embedding,) = FlowModel.load(config.model, "cpu", text_encoders=True).encode(["a red circle"])
        unit, tree = TrunkUnit(0, 0, "a red circle"), prompt_tree(config, 0, 0, "a red circle")
        trunk, _ = sampler.trunk(unit, embedding)
        found.append([sampler.branch(branch, embedding, trunk) for branch in branch_units(config, tree, unit)])
    for (mine, images), (theirs, others) in zip(*found, strict=True):
        assert np.array_equal(mine.log_prob, theirs.log_prob)
        assert np.abs(images.astype(float) - others).max() <= 2  # of 255: by rounding


def test_actors_of_their_own_are_in_the_plan_and_their_number_has_a_range():
    told = describe_plan(config_of(*APART))
    assert "by 3 actors of their own, each: " in told
    assert "actors of their own" not in describe_plan(config_of())
    with pytest.raises(ValueError, match=r"^rollout.completions.min_actors: 4 given; may be at most max_actors=3$"):
        config_of(*APART, "rollout.completions.min_actors=4")
    with pytest.raises(ValueError, match=r"^rollout.completions: .* of the velocities"):
        load_config(None, [*APART, "method=mix_grpo"])


def test_what_a_device_or_an_installation_lacks_is_one_line(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^rollout.completions.quantization: float8 given; not usable on cpu: "
    ) as told:
        quantize(transformer(), "float8", "cpu")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"^rollout.completions.quantization: nvfp4 given; not usable on cpu: "):
        quantize(transformer(), "nvfp4", "cpu")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"needs torchao; pip install 'g2rpo_ray\[completions\]'"):
        quantize(transformer(), "int8", "cpu")


def test_torchao_is_missed_before_anything_starts(monkeypatch):
    monkeypatch.setattr("g2rpo_ray.preflight.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^rollout.completions.quantization: given, but torchao is not"):
        check_files(config_of("rollout.completions.quantization=int8"), None)
