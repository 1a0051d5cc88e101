"""Each family of models against its pipeline's own call, on a tiny random pipeline of it."""

import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from g2rpo_ray.algo import shifted_sigmas
from g2rpo_ray.config import LoraConfig, ModelConfig, load_config
from g2rpo_ray.launch.plan import describe_plan
from g2rpo_ray.models import (
    FlowModel,
    add_lora,
    export_lora,
    fold_lora,
    load_lora,
    lora_parameters,
    lora_shapes,
    lora_state,
    one_prompt,
    read_lora,
)
from g2rpo_ray.models.base import FAMILIES
from g2rpo_ray.models.estimate import rollout_memory
from g2rpo_ray.rollout.plan import possible_trees, trunk_part
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import PromptEmbedding, SampleUnit, TrunkUnit
from tests.runs import head_command, kill_all, listens, lora, metrics, run, same_lora, wait_for
from tests.tiny_models import write_tiny

PROMPTS = ["a red cat", "two blue dogs on a very long green sofa", "7"]
STEPS = 4
SCALE = 2.5
PORT = 6395  # of the cluster that the whole runs share
DISTILLED = ("flux", "flux2")
families = pytest.mark.parametrize("family", sorted(FAMILIES.values()))


@functools.cache
def tiny(family: str) -> Path:
    return write_tiny(family, Path(FOLDER.name) / family)


FOLDER = tempfile.TemporaryDirectory()


def settings(family: str, **changes: Any) -> ModelConfig:
    large = family == "lumina2"  # eight pixels to a latent
    # the chat templates of the others are longer than what is cut at 64
    length = 64 if family in ("flux", "sd3", "chroma") else None
    negative = {"flux2_klein": "", **dict.fromkeys(DISTILLED)}.get(family, "bad")
    values = {
        "path": str(tiny(family)), "dtype": "float32", "height": 32 if large else 16, "width": 64 if large else 24,
        "guidance_scale": SCALE, "negative_prompt": negative, "max_sequence_length": length,
    }  # fmt: skip
    return ModelConfig(**values | changes)


def load(family: str, **changes: Any) -> FlowModel:
    torch.set_num_threads(1)
    return FlowModel.load(settings(family, **changes), "cpu", vae=True, transformer=True, text_encoders=True)


@functools.cache
def loaded(family: str) -> FlowModel:
    return load(family)


@functools.cache
def embeddings(family: str) -> tuple[list[PromptEmbedding], PromptEmbedding | None]:
    model, negative = loaded(family), settings(family).negative_prompt
    return model.encode(PROMPTS), None if negative is None else model.encode([negative], negative=True)[0]


def noise(model: FlowModel) -> torch.Tensor:
    return torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(3)])


@torch.no_grad()
def sample(
    family: str,
    model: FlowModel,
    *,
    prompts: list[PromptEmbedding] | None = None,
    negative: Any = "its own",
    sigmas: torch.Tensor | None = None,
    time: Callable[[torch.Tensor], torch.Tensor] = lambda sigma: sigma,
    speed: float = 1.0,
) -> np.ndarray:
    """Our images [3, H, W, 3] in 0..1, by Euler's method over the pipeline's grid."""
    conditioning = model.condition(
        prompts or embeddings(family)[0], embeddings(family)[1] if negative == "its own" else negative
    )
    x = noise(model)
    for now, then in itertools.pairwise(model.sigmas(STEPS) if sigmas is None else sigmas):
        x = x + (then - now) * speed * model.velocity(x, time(now.expand(len(x))), conditioning)
    return model.decode(x).numpy() / 255


def pipeline(family: str, lora: Path | None = None) -> Any:
    made = loaded(family).pipeline_class.from_pretrained(tiny(family))
    made.set_progress_bar_config(disable=True)
    if lora:
        made.load_lora_weights(lora)
    return made


def sample_by_diffusers(family: str, made: Any) -> np.ndarray:
    model, config = loaded(family), settings(family)
    options = {model.scale_name: SCALE}
    if config.negative_prompt:  # klein's is always ""
        options["negative_prompt"] = [config.negative_prompt] * 3
    images = made(
        prompt=list(PROMPTS), height=config.height, width=config.width, num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)], output_type="np",
        max_sequence_length=model.text_tokens, **options,
    ).images  # fmt: skip
    return np.asarray(images)


@functools.cache
def reference(family: str) -> tuple[np.ndarray, torch.Tensor]:
    made = pipeline(family)
    return sample_by_diffusers(family, made), made.scheduler.sigmas


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """In 1/255."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() * 255)


@families
def test_images_are_those_of_the_pipeline(family: str) -> None:
    theirs, grid = reference(family)
    assert theirs.std() > 0.05  # not one colour, which would be equal for nothing
    assert distance(sample(family, loaded(family)), theirs) <= 1
    assert torch.equal(loaded(family).sigmas(STEPS), grid)


@families
def test_noise_is_what_the_pipeline_draws(family: str) -> None:
    model, found = loaded(family), []
    made = pipeline(family)

    def first(noise_pred: Any, t: Any, latents: torch.Tensor, **_: Any) -> None:
        found.append(latents)
        raise StopIteration

    made.scheduler.step = first
    with pytest.raises(StopIteration):
        sample_by_diffusers(family, made)
    assert torch.equal(noise(model), found[0])
    assert found[0].shape[1:] == model.latent_shape


def changed(family: str, **attributes: Any) -> np.ndarray:
    """Images of the model with methods of its own replaced: each gets the model first."""
    model = load(family)
    for name, value in attributes.items():
        setattr(model, name, functools.partial(value, model) if callable(value) else value)
    return sample(family, model)


def mistakes(family: str) -> dict[str, Callable[[], np.ndarray]]:
    """Plausible ones, each with the images that come of it."""
    model = loaded(family)
    prompts, negative = embeddings(family)
    grid, kind = model.sigmas(STEPS), type(model)
    shuffled = [prompts[2], prompts[0], prompts[1]]
    found = {
        "the velocity's sign": lambda: sample(family, model, speed=-1),
        "time runs the other way": lambda: sample(family, model, time=lambda sigma: 1 - sigma),
        "time of another unit": lambda: sample(family, model, time=lambda sigma: sigma / 1000),
        "time of the step's end": lambda: sample(family, model, time=lambda s: grid[(grid == s[0]).nonzero()[0] + 1]
                                                 .expand(len(s))),
        "no shift": lambda: sample(family, model, sigmas=torch.linspace(1, 0, STEPS + 1) ** 1.5),
        "another shift": lambda: sample(family, model, sigmas=shifted_sigmas(STEPS, 9.0)),
        "the last step left out": lambda: sample(family, model, sigmas=grid[:-1]),
        "another scale of guidance": lambda: changed(family, guidance_scale=SCALE + 1),
        "another's prompt": lambda: sample(family, model, prompts=shuffled),
        "a prompt cut": lambda: sample(family, model, prompts=load(family, max_sequence_length=40).encode(PROMPTS)),
        "the VAE's scale": lambda: changed(family, _to_vae=lambda m, x: 0.5 * kind._to_vae(m, x)),
        "rows for columns": lambda: changed(family, _to_vae=lambda m, x: kind._to_vae(m, x).flip(-1)),
    }  # fmt: skip
    if negative is not None:
        other = load(family).encode(["a good and quite different one"], negative=True)[0]
        opposite = FlowModel._guide if family == "z_image" else lambda m, v, u: v + SCALE * (v - u)
        found |= {
            "no guidance": lambda: sample(family, model, negative=None),
            "another negative prompt": lambda: sample(family, model, negative=other),
            "guidance away from the prompt": lambda: changed(family, _guide=lambda m, v, u: kind._guide(m, u, v)),
            "another rule of guidance": lambda: changed(family, _guide=opposite),
        }
    if family in ("qwen_image", "lumina2"):
        found["guidance not rescaled"] = lambda: changed(family, _guide=FlowModel._guide)
    if family in ("chroma", "lumina2"):
        found["the mask ignored"] = lambda: sample(family, model, prompts=[unmasked(prompt) for prompt in prompts])
    if family == "lumina2":
        found["no system prompt"] = lambda: sample(family, model, prompts=model.encode(PROMPTS, negative=True))
    if family == "sd3":
        found["one shift where the scheduler makes two"] = lambda: sample(family, model, sigmas=shifted_sigmas(4, 3.0))
    return found


def unmasked(embedding: PromptEmbedding) -> PromptEmbedding:
    mask = embedding.tensors["prompt_attention_mask"]
    ones = replace(mask, data=np.ones_like(mask.data))
    return replace(embedding, tensors={**embedding.tensors, "prompt_attention_mask": ones})


@families
def test_mistakes_would_be_seen(family: str) -> None:
    found = {name: distance(images(), reference(family)[0]) for name, images in mistakes(family).items()}
    print(family, {name: round(value, 1) for name, value in found.items()})
    assert len(found) >= 10
    assert not {name: value for name, value in found.items() if not value > 1.5}


@families
@torch.no_grad()
def test_a_mixed_batch_is_each_alone(family: str) -> None:
    model, (prompts, negative) = loaded(family), embeddings(family)
    x, sigma = noise(model), torch.tensor([1.0, 0.73, 0.1])
    together = model.velocity(x, sigma, model.condition(prompts, negative))
    for at, prompt in enumerate(prompts):
        rows = slice(at, at + 1)
        alone = model.velocity(x[rows], sigma[rows], model.condition([prompt], negative))
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=2e-5 * float(alone.abs().max()))
    shared = model.velocity(x, sigma, model.condition(prompts[1:2], negative))
    torch.testing.assert_close(shared[1:2], together[1:2], rtol=1e-5, atol=2e-5 * float(shared.abs().max()))


@families
def test_what_rollout_saves_does_not_change_its_velocities(family: str) -> None:
    model, (prompts, _) = load(family), embeddings(family)
    x, sigma, conditioning = noise(model), torch.tensor([1.0, 0.73, 0.1]), model.condition(prompts[:1])
    add_lora(model.transformer, LoraConfig(rank=2, targets="all-linear"), seed=0)
    load_lora(model.transformer, random_state(model))
    with torch.inference_mode():
        expected = model.velocity(x, sigma, conditioning)
        fold_lora(model.transformer)
        with one_prompt(model.transformer):
            for _ in range(2):
                found = model.velocity(x, sigma, conditioning)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def random_state(model: FlowModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    state = lora_state(model.transformer)
    return {name: rng.normal(0, 0.2, array.shape).astype(np.float32) for name, array in state.items()}


@families
def test_every_tensor_of_the_default_lora_is_trained_and_the_export_is_the_pipelines(
    family: str, tmp_path: Path
) -> None:
    model, (prompts, negative), lora = load(family), embeddings(family), LoraConfig(rank=2, alpha=3)
    add_lora(model.transformer, lora, seed=0)
    state = random_state(model)
    assert {name: array.shape for name, array in state.items()} == lora_shapes(settings(family), lora)
    load_lora(model.transformer, state)
    x, sigma, conditioning = noise(model), torch.tensor([1.0, 0.73, 0.1]), model.condition(prompts, negative)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.velocity(x, sigma, conditioning).square().mean().backward()
        parameters = lora_parameters(model.transformer)
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
        assert not [name for name, gradient in gradients[-1].items() if not gradient.abs().max() > 0]
        model.transformer.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    export_lora(tmp_path, state, lora, model.pipeline_class)
    assert all(np.array_equal(array, state[name]) for name, array in read_lora(tmp_path).items())
    theirs = sample_by_diffusers(family, pipeline(family, tmp_path))
    assert distance(sample(family, model), theirs) <= 1
    assert distance(reference(family)[0], theirs) > 2


@families
def test_memory_is_estimated_without_weights(family: str) -> None:
    config = load_config().model_copy(update={"model": settings(family), "lora": LoraConfig(rank=2)})
    needed = rollout_memory(config)
    model = loaded(family)
    base = sum(p.numel() for part in (model.transformer, model.decoder) for p in part.parameters())
    adapter = sum(np.prod(shape) for shape in lora_shapes(config.model, config.lora).values())
    assert needed["weights"] == 4 * (base + adapter)
    assert needed["velocity"] > 0 < needed["decode"]


@pytest.mark.parametrize("family", DISTILLED)
def test_guidance_asked_of_a_distilled_model_is_refused(family: str) -> None:
    assert_refused(family, ["model.negative_prompt: 'bad' given", "distilled", "leave it out"], negative_prompt="bad")


@pytest.mark.parametrize(("family", "least"), [("sd3", 1), ("z_image", 0), ("qwen_image", 1)])
def test_a_scale_that_does_not_guide_is_refused(family: str, least: float) -> None:
    assert_refused(family, [f"model.guidance_scale: {least:g} given", f"more than {least:g}"], guidance_scale=least)


def test_a_size_that_the_vae_cannot_make_is_refused() -> None:
    assert_refused("qwen_image", ["model.height: 18 given; must be a multiple of 4", "16 or 20"], height=18)
    assert_refused("lumina2", ["model.width: 24 given; must be a multiple of 16", "16 or 32"], width=24)


def assert_refused(family: str, words: list[str], **changes: Any) -> None:
    with pytest.raises(ValueError, match=r"^model\.") as error:
        FlowModel.load(settings(family, **changes), "cpu")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_grid_that_needs_more_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sampler\.steps: 1 given; the pipeline's own grid needs more"):
        loaded("qwen_image").sigmas(1)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("evaluated", [True, False])
def test_rollout_and_evaluation_are_guided_apart_and_guidance_counts_twice(trained: bool, evaluated: bool) -> None:
    switches = [f"sampler.guidance={trained}", f"evaluation.guidance={evaluated}", "sampler.steps=4", "seed=1"]
    config = load_config(None, [*switches, "sampler.branch_steps=[0]", "model.path=x"])
    config = config.model_copy(update={"model": settings("sd3"), "lora": LoraConfig(rank=2)})
    (prompt, *_), negative = embeddings("sd3")
    sampler, embedding = Sampler(config), replace(prompt, negative=negative)
    (tree,) = possible_trees(config)
    sampler.trunk(TrunkUnit(0, 0, prompt.prompt), embedding)
    rollout = trunk_part(tree).evaluations
    assert sampler.evaluations == rollout * (2 if trained else 1) == rollout * config.velocity_cost
    before = sampler.evaluations
    images = sampler.sample(SampleUnit(prompt.prompt, (0, 1)), embedding)
    assert sampler.evaluations - before == 2 * 4 * (2 if evaluated else 1) == 2 * 4 * config.sample_cost
    plain = Sampler(config).sample(SampleUnit(prompt.prompt, (0, 1)), prompt)  # nothing to guide away from
    assert (images != plain).any() == evaluated
    told = f"{tree.evaluations * config.velocity_cost:g} velocity evaluations"
    assert told in describe_plan(config)


RUN = {
    "iterations": 2, "sampler.shift": "pipeline", "model.max_sequence_length": "null", "lora.targets": "null",
    "model.guidance_scale": SCALE, "evaluation.seeds": 1, "learner.gradient_checkpointing": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """One cluster for all runs: each would start its own otherwise."""
    options = ("--num-cpus=4", "--include-dashboard=false", "--object-store-memory=200000000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of the head, and of the runs that come to it
        command = head_command(PORT, *options)
        head = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for(head, lambda: listens(PORT))
            yield f"127.0.0.1:{PORT}"
        finally:
            kill_all(head)


def run_settings(family: str, folder: Path) -> dict[str, Any]:
    """Of a run on the family's tiny pipeline, with prompts of unlike length in `folder`."""
    config = settings(family)
    negative = "null" if config.negative_prompt is None else f"'{config.negative_prompt}'"
    texts = {"train": ["a red cat", "two blue dogs on a green sofa"], "heldout": ["7"]}
    for name, prompts in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    given = RUN | {
        "model.path": config.path, "model.height": config.height, "model.width": config.width,
        "model.negative_prompt": negative, "data.train_prompts": folder / "train.txt",
        "data.heldout_prompts": folder / "heldout.txt", "rewards.preference.kind": "jpeg_compressibility",
        "rewards.preference.options": "{}", "data.embeddings": folder / "embeddings",
    }  # fmt: skip
    return {key.replace(".", "__"): value for key, value in given.items()}


@pytest.mark.cluster
@pytest.mark.slow
@families
def test_a_whole_run_has_the_same_bits_with_one_actor_two_and_none(
    family: str, address: str, alone: Any, tmp_path: Path
) -> None:
    """On Ray and DeepSpeed, and in one process; prompts of unlike length meet in the learner's batches."""
    config, given = settings(family), run_settings(family, tmp_path)
    whole = alone(**given)
    for actors, name in ((1, "one"), (2, "two")):
        run(tmp_path, name, "--address", address, rollout__min_actors=actors, rollout__max_actors=actors, **given)
    (tree,) = possible_trees(load_config(str(tmp_path / "two" / "config.yaml")))
    cost = 1 if config.negative_prompt is None else 2
    for lines in (metrics(tmp_path, "one")[1:], metrics(tmp_path, "two")[1:], whole.result().lines):
        assert max(line["actor/ratio_initial_max_dev"] for line in lines) <= 1e-6
        assert [line["rollout/evaluations"] for line in lines] == [cost * 2 * tree.evaluations] * 2
    adapter = lora(tmp_path, "two")
    same_lora(adapter, lora(tmp_path, "one"))
    same_lora(adapter, whole.result().lora)
    assert any(np.abs(array).max() > 0 for name, array in adapter.items() if "lora_B" in name)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen_image"])
def test_a_run_goes_on_from_an_adapter_that_evaluate_judges_alike(family: str, address: str, tmp_path: Path) -> None:
    """`lora.initial` before its first step, and `evaluate` on its file: the same images, so the same score."""
    model, adapter = load(family), LoraConfig(rank=4)
    add_lora(model.transformer, adapter, seed=0)
    export_lora(tmp_path / "adapter", random_state(model), adapter, model.pipeline_class)
    dotted = run_settings(family, tmp_path) | {
        "iterations": 1,
        "lora__initial": tmp_path / "adapter",
        "lora__alpha": adapter.alpha,
    }
    run(tmp_path, "from", "--address", address, **dotted)
    arguments = ["--config", tmp_path / "from" / "config.yaml", "--adapter", f"new={tmp_path / 'adapter'}"]
    judged = subprocess.run(
        [sys.executable, "-m", "g2rpo_ray.evaluate", *map(str, arguments), "--address", address, "--seeds", "1",
         "--output", str(tmp_path / "judged"), "--set", "lora.initial=null"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not judged.returncode, judged.stdout + judged.stderr
    base, new = json.loads((tmp_path / "judged" / "table.json").read_text())["rows"]
    assert (base["adapter"], new["adapter"]) == ("base", "new")
    assert base["mean"] != new["mean"] == metrics(tmp_path, "from")[0]["heldout/preference/mean"]
