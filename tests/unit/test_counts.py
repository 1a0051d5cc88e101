"""What a rollout at the paper's setting evaluates, in which batches, and what it copies: counts, not seconds."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from g2rpo_ray.allocations import peak_bytes
from g2rpo_ray.config import load_config
from g2rpo_ray.methods import method_names
from g2rpo_ray.models import FlowModel, add_lora, fold_lora, lora_parameters, lora_state, one_prompt
from g2rpo_ray.models.estimate import LIBRARIES, rollout_memory, with_micro_batch
from g2rpo_ray.models.flux import Model as FluxModel
from g2rpo_ray.preflight import fit_batches
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import branch_part, branch_units, prompt_tree
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import BranchUnit, PromptEmbedding, StoredTensor, TrunkUnit

PAPER = ["steps=16", "branch_steps=[0,1,2,3,4,5,6,7]", "strides=[1,2,3]", "group_size=12", "layout=paper"]

SHAPES = {"prompt_embeds": (16, 64), "pooled_prompt_embeds": (64,)}

EMBEDDING = PromptEmbedding("x", {n: StoredTensor("float32", np.ones(s, np.float32)) for n, s in SHAPES.items()})


@pytest.fixture(scope="module")
def model():
    return FlowModel.load(load_config().model, "cpu", transformer=True, vae=True)


def paper(*given, **rollout):
    settings = [f"sampler.{s}" for s in PAPER] + [f"rollout.{k}={v}" for k, v in rollout.items()]
    return load_config(None, [*settings, *given])


class CountingModel(FluxModel):
    """Velocities and pictures that cost nothing, and how many were asked for at a time."""

    def __init__(self, model):
        vars(self).update(vars(model))
        self.batches, self.decoded, self.decoded_after = [], [], []

    def velocity(self, x, sigma, conditioning):
        self.batches.append(len(x))
        return 0.1 * x

    def decode(self, x):
        self.decoded.append(x.clone())
        self.decoded_after.append(len(self.batches))
        pictures = torch.zeros(len(x), 32 * 32 * 3, dtype=torch.uint8)
        pictures[:, :4] = x[:, 0, :1].contiguous().view(torch.uint8)  # so that each is known by its latent
        return pictures.view(-1, 32, 32, 3)


def counting(model, config):
    counted = CountingModel(model)
    counted.transformer = FlowModel.load(config.model, "cpu", transformer=True).transformer
    return counted, Sampler(config, counted)


def compute(sampler, config, steps=None):
    """All units of a prompt, or its trunk and the units of some branch steps."""
    unit = TrunkUnit(0, 0, "x")
    trunk, anchors = sampler.trunk(unit, EMBEDDING)
    units = [
        branch
        for branch in branch_units(config, prompt_tree(config, 0, 0, "x"), unit)
        if steps is None or branch.branch_step in steps
    ]
    return trunk, anchors, [(branch, *sampler.branch(branch, EMBEDDING, trunk)) for branch in units]


@pytest.mark.parametrize("size", [12, 6, 3])
@pytest.mark.parametrize("micro_batch", [5, 12, 36])
def test_every_needed_velocity_is_evaluated_once(model, size, micro_batch):
    config = paper(micro_batch=micro_batch, members_per_unit=size)
    counted, sampler = counting(model, config)
    compute(sampler, config)
    assert sampler.evaluations == sum(counted.batches) == 1912
    assert max(counted.batches) == min(micro_batch, 3 * size)


def test_the_quickstart_takes_402_evaluations_a_prompt(model):
    _, sampler = counting(model, load_config())
    compute(sampler, load_config())
    assert sampler.evaluations == 402


def test_without_anchors_a_trunk_ends_where_the_last_branch_leaves(model):
    """Steps 8 to 15 of the anchor serve nobody else; the velocity at step 7 serves its branches."""
    config = paper("evaluation.anchors=false")
    counted, sampler = counting(model, config)
    trunk, anchors, _ = compute(sampler, config, steps=[])
    assert counted.batches == [1] * 8
    assert (len(trunk.latents), len(trunk.velocities), len(anchors)) == (8, 8, 0)
    compute(sampler, config)
    assert sampler.evaluations == 8 + (1912 - 8)


@pytest.mark.parametrize("method", method_names())
def test_a_prompt_of_any_method_costs_what_its_tree_says(model, method):
    for size in ("null", "5"):
        config = load_config(None, [f"method={method}", "sampler.steps=6", f"rollout.members_per_unit={size}"])
        counted, sampler = counting(model, config)
        tree = prompt_tree(config, 0, 0, "x")
        _, anchors, branches = compute(sampler, config)
        assert sampler.evaluations == sum(counted.batches) == tree.evaluations
        assert len(anchors) + sum(len(images) for *_, images in branches) == len(tree.images)
        edges = np.concatenate([made.edges for _, made, _ in branches])
        assert sorted(edges) == list(range(len(tree.source)))


def test_a_member_does_not_depend_on_the_size_of_its_group_or_its_unit(model):
    def grown(group, **rollout):
        config = paper(f"sampler.group_size={group}", **rollout)
        _, sampler = counting(model, config)
        trunk, _, branches = compute(sampler, config, steps=[3])
        tree = prompt_tree(config, 0, 0, "x")
        child = {subtree.edges.start: subtree.child for subtree in tree.subtrees}
        edge = {int(tree.target[edge]): edge for edge in child}
        latents = {
            child[edge[node]]: latent
            for _, made, _ in branches
            for node, latent in zip(made.nodes.tolist(), made.latents, strict=True)
        }
        log_prob = {child[e]: p for _, made, _ in branches for e, p in zip(made.edges, made.log_prob, strict=True)}
        return trunk.latents[3], [latents[number] for number in range(6)], [log_prob[number] for number in range(6)]

    expected = grown(12)
    assert len({latent.tobytes() for latent in expected[1]}) == 6
    for found in (grown(6), grown(8, members_per_unit=3), grown(12, members_per_unit=5, micro_batch=4)):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_batches_are_full_until_the_last_trajectories_end(model):
    config = paper(micro_batch=12)
    counted, sampler = counting(model, config)
    compute(sampler, config, steps=[0])
    # 12 members from index 1: 15 evaluations at stride 1 (1, 2 ... 15), 8 at stride 2 (1, 3, 5 ... 15), where the first
    # is shared, 6 at stride 3 (1, 3, 6 ... 15), where index 3 after index 1 is stride 2's, too
    assert counted.batches[:16] == [1] * 16
    assert counted.batches[16:] == [12] * (15 + 7 + 4)
    tree = prompt_tree(config, 0, 0, "x")
    assert branch_part(tree, BranchUnit(0, 0, "x", 0, 0, 12)).evaluations == 12 * 26


def test_a_prompt_takes_few_batches(model):
    found = {}
    for micro_batch in (12, 36):
        config = paper(micro_batch=micro_batch)
        counted, sampler = counting(model, config)
        compute(sampler, config)
        found[micro_batch] = len(counted.batches)
    assert found == {12: 16 + 1896 // 12, 36: 16 + 8 + sum(range(7, 15))}  # 36: as many as the longest path takes


def test_pictures_are_decoded_in_batches_beside_the_last_velocities(model):
    """At step 3 a member's paths (4, 5 ... 15), (4, 5, 7 ... 15) and (4, 6, 9, 12, 15) are 12, 5 more and 4 more."""
    config = paper(micro_batch=12, decode_batch=16)
    counted, sampler = counting(model, config)
    *_, [(_, _, pictures)] = compute(sampler, config, steps=[3])
    assert list(map(len, counted.decoded)) == [1, 16, 16, 4]
    velocities = len(counted.batches)
    assert velocities == 16 + 12 + 5 + 4
    # the last three batches of velocities end the trajectories of 4 members each: 12, 24 and 36 of them are there
    assert counted.decoded_after == [16, velocities - 1, velocities, velocities]
    config = paper(micro_batch=36, decode_batch=16)
    together, sampler = counting(model, config)
    compute(sampler, config, steps=[3])
    # all trajectories advance together: those of stride 3 end first, those of stride 1 last, and with them each batch
    assert together.decoded_after == [16] + [16 + 12] * 3
    assert all(map(torch.equal, together.decoded, counted.decoded))  # the same images are in the same batches
    config = paper(micro_batch=36, decode_batch=1)
    alone, sampler = counting(model, config)
    *_, [(_, _, others)] = compute(sampler, config, steps=[3])
    # each as it ends: the third of every member's after 5 batches, the second after 7, the first after 12
    assert alone.decoded_after == [16] + [16 + 5] * 12 + [16 + 7] * 12 + [16 + 12] * 12
    assert len({picture.tobytes() for picture in pictures}) == 36
    assert np.array_equal(others, pictures)  # in the order of their nodes, whatever ended first


class Copies(TorchFunctionMode):
    """Counts the calls that would move data between host and device."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tensor", "copy_"):
            self.found[name] += 1
        if name == "to" and isinstance(args[1], str):
            self.found["to device"] += 1
        if name in ("__getitem__", "__setitem__") and isinstance(args[1], list):
            self.found["index"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("edges", [1, 3])
def test_what_a_unit_copies_does_not_depend_on_how_long_its_paths_are(model, edges):
    config = paper(f"sampler.stochastic_edges={edges}", "credit.group=step", micro_batch=36, decode_batch=12)
    counted, sampler = counting(model, config)
    trunk, *_ = compute(sampler, config, steps=[])
    for step in (0, 7):
        counted.batches.clear()
        with Copies() as copies:
            sampler.branch(BranchUnit(0, 0, "x", step, 0, 12), EMBEDDING, trunk)
        # in: latents and velocity of the trunk, noise of a depth, prompt, what the batches hold; out: latents,
        # log-probabilities, pictures
        assert copies.found == {"tensor": 3, "to device": edges + 2, "cpu": 2, "copy_": 3}


def noise_lora(transformer, seed):
    with torch.no_grad():
        for number, parameter in enumerate(lora_parameters(transformer).values()):
            parameter.normal_(0, 0.1, generator=generator(seed, number))


def test_what_rollout_saves_does_not_change_its_velocities():
    config = load_config(None, ["lora.alpha=24"])  # all-linear: the prompt's projections have a LoRA too
    model = FlowModel.load(config.model, "cpu", transformer=True)
    add_lora(model.transformer, config.lora, seed=0)
    x = torch.stack([model.initial_noise(generator("x", n)) for n in range(5)])
    sigma, conditioning = torch.linspace(0.1, 1, 5), model.condition([EMBEDDING])
    names = [name for name, _ in model.transformer.named_modules()]
    expected = []
    with torch.inference_mode():
        for seed in (1, 2):
            noise_lora(model.transformer, seed)
            expected.append(model.velocity(x, sigma, conditioning))
        fold_lora(model.transformer)
        for seed, reference in zip((1, 2), expected, strict=True):
            noise_lora(model.transformer, seed)  # new weights: nothing of the old ones may be left
            with one_prompt(model.transformer):
                parts = [model.velocity(x[rows], sigma[rows], conditioning) for rows in (slice(0, 1), slice(1, 5))]
            torch.testing.assert_close(torch.cat(parts), reference, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert [name for name, _ in model.transformer.named_modules()] == names


def test_what_the_prompt_decides_is_evaluated_once_a_unit():
    config = paper(micro_batch=6)
    sampler = Sampler(config)
    transformer, calls = sampler._model.transformer, Counter()
    time_text = transformer.time_text_embed
    once = [transformer.context_embedder, transformer.pos_embed, time_text.text_embedder, time_text.guidance_embedder]
    for module in [*once, transformer.x_embedder]:
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    trunk, _ = sampler.trunk(TrunkUnit(0, 0, "x"), EMBEDDING)
    assert [calls[module] for module in once] == [1] * 4
    assert calls[transformer.x_embedder] == 16
    sampler.branch(BranchUnit(0, 0, "x", 7, 0, 2), EMBEDDING, trunk)
    assert [calls[module] for module in once] == [2] * 4


def test_memory_is_estimated_without_weights(model):
    def run():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b + 1

    assert peak_bytes(run, "cpu") == 2 * 4000
    config = load_config()
    transformer = FlowModel.load(config.model, "cpu", transformer=True).transformer
    base = sum(p.numel() for p in transformer.parameters()) + sum(
        p.numel() for p in model._pipeline.vae.decoder.parameters()
    )
    add_lora(transformer, config.lora, seed=0)
    adapter = sum(array.nbytes for array in lora_state(transformer).values())
    small, large = (rollout_memory(load_config(None, [f"rollout.micro_batch={n}"])) for n in (4, 8))
    assert small["weights"] == 4 * base + adapter
    assert large["velocity"] == pytest.approx(2 * small["velocity"], rel=0.05)
    assert large["decode"] == small["decode"] > 16 * 32 * 32 * 3 * 4


@pytest.mark.parametrize("n", [1, 5, 16])
def test_the_largest_batch_that_fits_is_chosen_before_anything_starts(n):
    config = load_config()
    assert config.rollout.micro_batch == 16
    needed = sum(rollout_memory(with_micro_batch(config, n)).values()) + LIBRARIES
    for gib, fits in (((needed + 1e4) / 2**30, n), (80, 16)):
        given = load_config(None, [f"rollout.memory_gib={gib}"])
        assert fit_batches(given).rollout.micro_batch == fits
    assert fit_batches(config) is config
