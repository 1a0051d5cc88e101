"""The product on an emulated GPU (tests/support/emulated_device.py): no mixed devices, the CPU's bits, few waits.

Text encoders, work units of the sampler and losses of the learner, of every family; and rewards.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from g2rpo_ray.allocations import peak_bytes
from g2rpo_ray.config import Config, LoraConfig, load_config
from g2rpo_ray.learner.batch import BatchShape, RankMetrics, micro_batches, spread
from g2rpo_ray.learner.copies import Copies
from g2rpo_ray.learner.forward import ForwardLoss
from g2rpo_ray.learner.loss import EdgeLoss, states_of
from g2rpo_ray.models import FlowModel, lora_state
from g2rpo_ray.rewards import build_reward
from g2rpo_ray.rollout.plan import branch_units, prompt_tree
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import PromptEmbedding, PromptRollout, SampleUnit, TrunkUnit
from g2rpo_ray.without_data import without_data
from g2rpo_ray.worlds.quickstart import PREFERENCE_ARCHITECTURE, PREFERENCE_CHECKPOINT
from tests.support.emulated_device import CUDA, EmulatedGpu
from tests.support.geneval_files import IMAGES as PHOTOS
from tests.support.geneval_files import METADATA
from tests.support.geneval_files import built as geneval
from tests.support.geneval_files import folder as geneval_folder  # noqa: F401  fixtures
from tests.support.hpsv3_files import built as hpsv3
from tests.support.hpsv3_files import folder as hpsv3_folder  # noqa: F401  fixtures
from tests.support.pipelines import PROMPTS, TEXT_FAMILIES, random_state
from tests.support.pipelines import settings as model_settings
from tests.support.reward_files import (  # noqa: F401  fixtures
    LOADED,
    aesthetic_files,
    clip_files,
    files,
    imagereward_files,
    noise,
    transformers_files,
)
from tests.support.videoalign_files import built as videoalign
from tests.support.videoalign_files import folder as videoalign_folder  # noqa: F401  fixtures

TREE = [
    "sampler.steps=3", "sampler.branch_steps=[0]", "sampler.group_size=3", "sampler.stochastic_edges=2",
    "sampler.strides=[1]", "credit.group=step", "evaluation.anchors=true", "rollout.micro_batch=2",
    "rollout.decode_batch=1", "learner.micro_batch=2", "model.path=x", "seed=1",
]  # fmt: skip

PREDICT = "g2rpo_ray.models.base.FlowModel._output_of"

PREDICTS = {"qwen_image_21": "g2rpo_ray.models.qwen_image_21.Model._evaluate"}

"""In its place, by family."""

WAITS_OF_LIBRARIES = {"chroma": 2, "lumina2": 8, "qwen_image_21": 14}

"""In an evaluation with guidance, by family, in PREDICT: diffusers reads masks, to know the lengths of prompts."""

WAITS_WITH_GRADIENTS = WAITS_OF_LIBRARIES | {"qwen_image_21": 16}

WAITS_IF_UNLIKE = {"qwen_image": 2, "qwen_image_21": 2 * 8}

"""The same, of prompts of unlike length in a batch."""

CASES = [*((family, "bfloat16") for family in TEXT_FAMILIES), ("qwen_image", "float32")]

"""Families in the dtype of published weights, and one in float32, where a difference in rounding shows."""

cases = pytest.mark.parametrize(("family", "dtype"), CASES)

Bits = list[np.ndarray]


def config_of(family: str, dtype: str, device: str, *more: str) -> Config:
    """Settings of a run: `device` follows from the resources."""
    resources = "{CPU: 1, GPU: 1}" if device == "cuda" else "{CPU: 1}"
    config = load_config(None, [*TREE, f"rollout.resources={resources}", f"learner.resources={resources}", *more])
    return config.model_copy(update={"model": model_settings(family, dtype=dtype), "lora": LoraConfig(rank=2)})


@contextmanager
def on(device: str) -> Iterator[EmulatedGpu | None]:
    with EmulatedGpu() if device == "cuda" else nullcontext() as gpu:
        yield gpu


@functools.cache
def loaded(family: str, dtype: str, device: str) -> FlowModel:
    model = FlowModel.load(model_settings(family, dtype=dtype), device, vae=True, transformer=True, text_encoders=True)
    if device == "cpu":  # weights lie as in their file, and MKL rounds by the alignment of its inputs
        for parameter in model.transformer.parameters():
            parameter.data = parameter.data.clone()
    return model


@functools.cache
def embeddings(family: str, dtype: str, device: str) -> list[PromptEmbedding]:
    """Of two prompts of unlike length, each with the negative one where the family has guidance."""
    with on(device):
        model, negative = loaded(family, dtype, device), model_settings(family).negative_prompt
        other = None if negative is None else model.encode([negative], negative=True)[0]
        return [replace(embedding, negative=other) for embedding in model.encode(PROMPTS[:2])]


@functools.cache
def sampler(family: str, dtype: str, device: str) -> Sampler:
    """With a LoRA that changes something."""
    with on(device):
        made = Sampler(config_of(family, dtype, device), loaded(family, dtype, device))
        made.load_weights(random_state(loaded(family, dtype, device)))
        return made


def assert_same(found: Bits, expected: Bits) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(theirs).all()
        np.testing.assert_array_equal(ours, theirs, strict=True)


# The emulation itself.


def test_tensors_of_both_devices_are_refused() -> None:
    with EmulatedGpu():
        x = torch.arange(6.0).view(2, 3).to("cuda")
        assert x.device == torch.zeros(1, device="cuda").device == CUDA
        for mixed in (
            lambda: x + torch.ones(3), lambda: torch.ones(3) + x, lambda: torch.cat([x, torch.ones(2, 3)]),
            lambda: torch.nn.functional.linear(x, torch.ones(4, 3)), lambda: x.mul_(torch.ones(3)),
            lambda: torch.ones(2)[torch.ones(1, dtype=torch.int64, device="cuda")],
            lambda: torch.where(x > 1, x, torch.ones(2, 3)), lambda: torch.nn.Linear(3, 3)(x),
            lambda: torch.nn.functional.scaled_dot_product_attention(x, x, torch.ones(2, 3)),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="found tensors on two devices"):
                mixed()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            x.numpy()
        assert torch.equal((x * torch.tensor(2.0)).cpu(), torch.arange(6.0).view(2, 3) * 2)  # numbers may be mixed
        assert torch.nn.Linear(3, 3).to("cuda")(x).device == CUDA


def test_copies_and_waits_are_counted_by_function() -> None:
    here = f"{__name__}.test_copies_and_waits_are_counted_by_function"
    with EmulatedGpu() as gpu:
        x = torch.ones(4, 2).to("cuda")
        assert (gpu.to_device, gpu.to_host, gpu.waits) == ({here: 1}, {}, {here: 1})
        x += torch.ones(4, 2).pin_memory().to("cuda", non_blocking=True)
        assert (gpu.to_device, gpu.waits) == ({here: 2}, {here: 1})
        pinned = torch.empty(4, 2, pin_memory=True)
        pinned[1:].copy_(x[1:], non_blocking=True)
        assert (gpu.to_host, gpu.waits) == ({here: 1}, {here: 1})
        for waits in (
            lambda: x.cpu(), lambda: float(x.sum()), lambda: bool((x > 0).all()), lambda: x.tolist(), lambda: x[x > 0],
            lambda: x.to("cpu", non_blocking=True), lambda: x[torch.tensor([0, 1])], torch.cuda.Stream().synchronize,
        ):  # fmt: skip
            before = gpu.waits.total()
            waits()
            assert gpu.waits.total() == before + 1


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the arguments of a real transformer. On the CPU it changes nothing."""
    kind = type(loaded("flux", "bfloat16", "cpu"))
    others, (expected, _) = kind._others, results("flux", "bfloat16", "cpu")

    def forgets_the_device(self: Any, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        given = others(self, n, text)
        return given | {"txt_ids": torch.zeros(given["txt_ids"].shape)}

    monkeypatch.setattr(kind, "_others", forgets_the_device)
    assert_same(bits(work("flux", "bfloat16", "cpu")[0]), bits(expected))
    with pytest.raises(RuntimeError, match="found tensors on two devices"):
        work("flux", "bfloat16", "cuda")


def test_a_wait_in_the_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(loaded("flux", "bfloat16", "cpu"))
    predict = kind._predict

    def looks(self: Any, x: torch.Tensor, sigma: torch.Tensor, text: Mapping[str, Any]) -> torch.Tensor:
        assert x.isfinite().all()
        return predict(self, x, sigma, text)

    monkeypatch.setattr(kind, "_predict", looks)
    trunk, branches, samples = (cost.waits_in_loop for cost in work("flux", "bfloat16", "cuda")[1])
    assert (trunk.total(), branches.total(), samples.total()) == (3, 3, 6)


# Text encoders.


@cases
def test_text_encoders_compute_the_cpus_embeddings(family: str, dtype: str) -> None:
    found, expected = (embeddings(family, dtype, device) for device in ("cuda", "cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.prompt == theirs.prompt
        assert_same(*([tensor.data for tensor in each.tensors.values()] for each in (ours, theirs)))
        if theirs.negative:
            assert_same(*([tensor.data for tensor in each.negative.tensors.values()] for each in (ours, theirs)))


# The sampler's units: a trunk, its branches, held-out samples.


@dataclass(frozen=True)
class Cost:
    """Of a unit, by the function that causes it."""

    to_host: Counter[str]
    waits: Counter[str]
    waits_in_loop: Counter[str]  # from the first velocity to the last


def work(family: str, dtype: str, device: str) -> tuple[list[Any], list[Cost]]:
    """A prompt's trunk, branches and samples, and on the emulated device what each costs."""
    made, (embedding, _) = sampler(family, dtype, device), embeddings(family, dtype, "cpu")
    unit, costs = TrunkUnit(0, 0, embedding.prompt), []
    with on(device) as gpu:

        def costing(compute: Callable[[], Any]) -> Any:
            with watched_velocity(gpu, made._model) as seen:
                result = compute()
            costs.append(Cost(gpu.to_host.copy(), gpu.waits.copy(), seen[-1] - seen[0]) if gpu else None)
            return result

        if gpu:
            made.trunk(unit, embedding)  # what is computed once is kept on the device
        trunk, anchors = costing(lambda: made.trunk(unit, embedding))
        (part,) = branch_units(made._config, prompt_tree(made._config, 0, 0, embedding.prompt), unit)
        branches, images = costing(lambda: made.branch(part, embedding, trunk))
        samples = costing(lambda: made.sample(SampleUnit(embedding.prompt, (0, 1, 2)), embedding))
    return [trunk, anchors, branches, images, samples], costs


results = functools.cache(work)


@contextmanager
def watched_velocity(gpu: EmulatedGpu | None, model: FlowModel) -> Iterator[list[Counter[str]]]:
    """Yields the waits so far before and after each velocity."""
    seen: list[Counter[str]] = []
    original = model.velocity

    def velocity(*given: Any) -> torch.Tensor:
        seen.append(gpu.waits.copy())
        result = original(*given)
        seen.append(gpu.waits.copy())
        return result

    with pytest.MonkeyPatch.context() as patch:
        if gpu:
            gpu.clear()
            patch.setattr(model, "velocity", velocity)
        yield seen


def bits(parts: Sequence[Any]) -> Bits:
    return [
        array
        for part in parts
        for array in ([part] if isinstance(part, np.ndarray) else [getattr(part, name) for name in part.__slots__])
    ]


@cases
def test_units_of_the_sampler_have_the_cpus_bits_and_wait_for_their_results_alone(family: str, dtype: str) -> None:
    (found, costs), (expected, _) = (results(family, dtype, device) for device in ("cuda", "cpu"))
    assert_same(bits(found), bits(expected))
    module = "g2rpo_ray.rollout"
    for (arrays, images, evaluations), cost in zip([(2, 1, 3), (2, 3, 3), (0, 3, 6)], costs, strict=True):
        decoded, copied = f"{module}.decoder.Decoding._decode", f"{module}.sampler._array"
        allowed = Counter({PREDICTS.get(family, PREDICT): WAITS_OF_LIBRARIES.get(family, 0) * evaluations})
        assert cost.to_host == Counter({decoded: images, copied: arrays}), family
        assert cost.waits_in_loop == allowed
        assert decoded not in cost.waits
        assert cost.waits[copied] == arrays
        assert cost.waits[f"{module}.decoder.Decoding.images"] == 1


# The losses of the learner.

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "clip": ("kl_beta=0.1", "edge_weight=1.73"),
    "stale clip": ("schedule=per_step",),
    "rollout's clip": ("old_log_prob=rollout", "schedule=per_step"),
    "guard": ("schedule=per_step",),
    "rollout's guard": ("old_log_prob=rollout",),
    "dppo": ("schedule=per_step",),
    "reinforce": ("subpaths=[2, 3]",),
    "nft": ("draws=2", "kl_beta=0.1", "old_decay=[1, 0.2, 0.5]"),
    "stale nft": ("times=logit_normal",),
    "awm": ("kl_beta=0.1", "old_decay=[1, 0.2, 0.5]", "old_kl=3"),
    "stale awm_ghuber": ("times=uniform",),
}

"""Settings of the learner, by objective; `stale`: by rollouts of the policy before."""


@functools.cache
def rollouts(family: str, dtype: str, *settings: str) -> list[PromptRollout]:
    """Of two prompts of unlike length, sampled on the CPU, with drawn scores."""
    made = copy.copy(sampler(family, dtype, "cpu"))
    made._config = config = config_of(family, dtype, "cpu", *settings)
    found, rng = [], np.random.default_rng(0)
    for slot, embedding in enumerate(embeddings(family, dtype, "cpu")):
        unit, tree = TrunkUnit(0, slot, embedding.prompt), prompt_tree(config, 0, slot, embedding.prompt)
        trunk, _ = made.trunk(unit, embedding)
        branches = [made.branch(part, embedding, trunk)[0] for part in branch_units(config, tree, unit)]
        scores = rng.normal(size=(len(config.rewards), len(tree.leaf))).astype(np.float32)
        found.append(PromptRollout(0, slot, embedding.prompt, tree, scores, embedding, trunk, tuple(branches)))
    return found


def losses(family: str, dtype: str, device: str, stale: bool, *settings: str) -> tuple[Bits, Counter[str]]:
    """Losses and metrics of an update, without its backward passes, and the waits that they cause."""
    config, model = config_of(family, dtype, device, *settings), sampler(family, dtype, device)._model
    sampled = rollouts(family, dtype, *settings)
    with on(device) as gpu:
        now = lora_state(model.transformer)
        copies = Copies.of(config.learner, model.device, 0, lambda: now, {}, None)
        copies.publish(0, lambda: {name: 0.9 * array for name, array in now.items()})
        copies.publish(1, lambda: now)
        copies.begin(lambda: now, on_policy=not stale)
        made = ForwardLoss if config.learner.forward else EdgeLoss
        loss: Any = made(config, model, model.transformer, sigma_grid(config.sampler, model), copies)
        metrics, (shard,) = RankMetrics(), spread(sampled, 1)
        batch = BatchShape.of([shard], config.learner, on_policy=not stale)
        states = loss.prepare(states_of(config, shard, batch, metrics), batch, metrics)
        if gpu:
            gpu.clear()
        parts = [
            part
            for step in batch.steps
            for some in micro_batches(states[step.key], config.learner.micro_batch)
            for part in loss(some, step, metrics)
        ]
        waits = gpu.waits.copy() if gpu else Counter()
        found = [value.detach().cpu().numpy() for part, named in parts for value in (part, *named.values())]
    return [*found, *(np.array(values) for values in metrics.mismatch.values())], waits


def assert_losses_are_the_cpus(family: str, dtype: str, stale: bool, *settings: str) -> Counter[str]:
    """The waits on the emulated device, for more to be said of them."""
    (found, waits), (expected, _) = (losses(family, dtype, device, stale, *settings) for device in ("cuda", "cpu"))
    assert_same(found, expected)
    assert any(np.abs(value).max() > 0 for value in expected)
    return waits


@cases
def test_losses_of_every_family_are_the_cpus_and_wait_for_their_inputs_alone(family: str, dtype: str) -> None:
    """Two prompts: a state each in the first optimizer step, which is fresh, and three in the second one."""
    waits = assert_losses_are_the_cpus(family, dtype, False, "learner.schedule=per_step")
    batches, states, fresh = 4, 8, 2
    conditioning = sum(number for name, number in waits.items() if ".conditioning.on_device" in name)
    assert 0 < conditioning <= batches * 4  # tensors of a prompt, and as many of the negative one
    loss = "g2rpo_ray.learner.loss.EdgeLoss"
    expected = Counter({
        f"{loss}._inputs": batches,  # noise levels
        # latents of a batch; next latents, for the old and the new policy; velocity and log-probs of the rollout
        f"{loss}._on_device": batches + 2 * states + 2 * fresh,
        f"{loss}._state_loss": 2 * states + states - fresh,  # advantages, which are valid; old log-probabilities
        f"{loss}._mismatch": 4 * fresh,
        "g2rpo_ray.learner.batch.RankMetrics.observe": 3 * fresh,
        PREDICTS.get(family, PREDICT): (
            WAITS_WITH_GRADIENTS.get(family, 0) * batches + WAITS_IF_UNLIKE.get(family, 0)
        ),
    })  # fmt: skip
    assert Counter({name: number for name, number in waits.items() if ".conditioning." not in name}) == expected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_every_objective_are_the_cpus(name: str) -> None:
    settings = [f"learner.{setting}" for setting in OBJECTIVES[name]]
    objective = f"learner.objective={name.split()[-1]}"
    assert_losses_are_the_cpus("flux", "bfloat16", name.startswith("stale"), objective, *settings)


# Rewards.


@pytest.fixture
def reward(
    request: pytest.FixtureRequest,
    files: Callable[[str], dict[str, Any]],
) -> Callable[..., np.ndarray]:
    """Scores of a kind of reward on a device."""

    def score(kind: str, **options: Any) -> np.ndarray:
        if kind in ("mask2former", "owl", "dino"):
            folder, metadata = request.getfixturevalue("geneval_folder"), {"include": [{"class": "cat", "count": 1}]}
            return geneval(folder, kind, **options).score(PHOTOS, ["x"] * 2, [METADATA | metadata] * 2)
        if kind == "hpsv3":
            return hpsv3(request.getfixturevalue("hpsv3_folder"), **options).score(noise(2, 48, 80), PROMPTS[:2])
        if kind == "videoalign":
            options |= {"part": "motion_quality"}
            videos = noise(8, 48, 80).reshape(2, 4, 48, 80, 3)
            return videoalign(request.getfixturevalue("videoalign_folder"), **options).score(videos, PROMPTS[:2])
        if kind == "hpsv2":
            options |= {"checkpoint": str(PREFERENCE_CHECKPOINT), "architecture": str(PREFERENCE_ARCHITECTURE)}
        else:
            options |= files(kind)
        return build_reward(kind, **options).score(noise(3, 48, 80), PROMPTS)

    return score


REWARDS = ["hpsv2", *LOADED, "hpsv3", "videoalign", "mask2former", "owl", "dino"]


@pytest.mark.parametrize("kind", REWARDS)
def test_scores_of_rewards_are_the_cpus(kind: str, reward: Callable[..., np.ndarray]) -> None:
    expected = reward(kind, device="cpu", dtype="bfloat16")
    with EmulatedGpu() as gpu:
        found = reward(kind, device="cuda", dtype="bfloat16")
    assert_same([found], [expected])
    assert gpu.to_device.total() > 10


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_run_without_data(kind: str, reward: Callable[..., np.ndarray]) -> None:
    def bytes_of(device: str) -> int:
        return peak_bytes(lambda: reward(kind, device=device, dtype="bfloat16"), device)

    with without_data():
        found = bytes_of("meta")
    assert 0.1 < found / bytes_of("cpu") < 3  # images are prepared on the CPU
