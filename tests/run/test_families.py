"""Each family of models against its pipeline's own call, on a tiny random pipeline of it."""

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from g2rpo_ray.algo.schedule import shifted_sigmas
from g2rpo_ray.commands.plan import describe_plan
from g2rpo_ray.config import LoraConfig, load_config
from g2rpo_ray.models import (
    FlowModel,
    add_lora,
    export_lora,
    fold_lora,
    load_lora,
    lora_parameters,
    lora_shapes,
    one_prompt,
    read_lora,
)
from g2rpo_ray.models.estimate import rollout_memory
from g2rpo_ray.rollout.plan import possible_trees, trunk_part
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import PromptEmbedding, SampleUnit, TrunkUnit
from tests.support.pipelines import (
    DISTILLED,
    PROMPTS,
    SCALE,
    TEXT_FAMILIES,
    embeddings,
    load,
    loaded,
    pipeline,
    random_state,
    run_settings,
    settings,
    tiny,
)

STEPS = 4

GRIDS = (*range(2, 15), 20, 25, 28, 40, 50)

families = pytest.mark.parametrize("family", TEXT_FAMILIES)


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


def sample_by_diffusers(family: str, made: Any, steps: int = STEPS) -> np.ndarray:
    model, config = loaded(family), settings(family)
    options = {model.scale_name: SCALE}
    if config.negative_prompt:  # klein's is always ""
        options["negative_prompt"] = [config.negative_prompt] * 3
    if family == "qwen_image_21":  # positions depend on what is padded; it cuts no prompt; its pictures have an alpha
        options = {name: value[0] if isinstance(value, list) else value for name, value in options.items()}
        images = [
            made(prompt=prompt, height=config.height, width=config.width, num_inference_steps=steps,
                 generator=torch.Generator().manual_seed(seed), output_type="np", **options).images[0]
            for seed, prompt in enumerate(PROMPTS)
        ]  # fmt: skip
        return over_white(np.stack(images))
    drawn = made(
        prompt=list(PROMPTS), height=config.height, width=config.width, num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)], output_type="np",
        max_sequence_length=model.text_tokens, **options, **({"num_frames": 1} if family == "wan" else {}),
    )  # fmt: skip
    return np.asarray(drawn.images if family != "wan" else drawn.frames[:, 0])


def over_white(images: np.ndarray) -> np.ndarray:
    return images[..., :3] * images[..., 3:] + 1 - images[..., 3:]


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
def test_the_grid_is_the_pipeline_s_bit_for_bit(family: str) -> None:
    model, made, found = loaded(family), pipeline(family), []
    asked, encoded = made.scheduler.set_timesteps, []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not encoded:
            encoded.append(type(made).encode_prompt(made, *args, **kwargs))
        return encoded[0]

    @functools.wraps(asked)  # the pipeline looks at its arguments
    def stop(*args: Any, **kwargs: Any) -> None:
        asked(*args, **kwargs)
        found.append(made.scheduler.sigmas)
        raise StopIteration

    made.encode_prompt, made.scheduler.set_timesteps = once, stop
    for steps in GRIDS:
        with pytest.raises(StopIteration):
            sample_by_diffusers(family, made, steps)
        assert torch.equal(model.sigmas(steps), found[-1]), steps


@families
def test_a_prompt_that_is_cut_is_reported_once_with_its_length(family: str) -> None:
    """A letter is a token; 60 of them push what is behind the prompt in a chat template out, too."""
    model = load(family, max_sequence_length=settings(family).max_sequence_length and 128)  # CLIP reads 77
    limit = model.text_tokens
    model.encode([*PROMPTS, "y" * limit + "a" * 40])
    (counted,) = re.findall(r"has (\d+) tokens, (\d+) are read", model.take_cut_message())
    tokens, read = map(int, counted)
    assert read == limit
    assert model.take_cut_message() == ""
    fits = "y" * (limit + 40 - (tokens - read))
    model.encode([fits])
    assert model.take_cut_message() == ""
    model.encode([fits + "a"])
    assert f"'{fits[:60]}' has {limit + 1} tokens, {limit} are read" in model.take_cut_message()
    assert alike(*model.encode([fits + "c" * 60 + "a", fits + "c" * 60 + "b"]))
    assert not alike(*model.encode([fits[1:] + "a", fits[1:] + "b"]))


def alike(one: PromptEmbedding, other: PromptEmbedding) -> bool:
    return all(np.array_equal(tensor.data, other.tensors[name].data) for name, tensor in one.tensors.items())


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
    assert torch.equal(noise(model)[: len(found[0])], found[0])
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
    shuffled, shorter = [prompts[2], prompts[0], prompts[1]], 20 if family == "qwen_image_21" else 40
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
        "a prompt cut": lambda: sample(
            family, model, prompts=load(family, max_sequence_length=shorter).encode(PROMPTS)
        ),
        "the VAE's scale": lambda: changed(family, _to_vae=lambda m, x: 0.5 * kind._to_vae(m, x)),
        "rows for columns": lambda: changed(family, _to_vae=lambda m, x: kind._to_vae(m, x).flip(-1)),
    }  # fmt: skip
    if negative is not None:
        other = load(family).encode(["a good and quite different one"], negative=True)[0]
        opposite = FlowModel._guide if family == "z_image" else lambda m, v, u, s: v + SCALE * (v - u)
        found |= {
            "no guidance": lambda: sample(family, model, negative=None),
            "another negative prompt": lambda: sample(family, model, negative=other),
            "guidance away from the prompt": lambda: changed(family, _guide=lambda m, v, u, s: kind._guide(m, u, v, s)),
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
    for name, array in read_lora(tmp_path, lora, model.pipeline_class).items():
        np.testing.assert_allclose(array, state[name], rtol=1e-7)  # alpha / rank is no power of two
    ours, made = sample(family, model), pipeline(family, tmp_path)
    theirs = sample_by_diffusers(family, made)
    assert distance(ours, theirs) <= 1
    made.unload_lora_weights()
    made.load_lora_weights(load_file(tmp_path / "pytorch_lora_weights.safetensors"))  # as programs without metadata
    assert distance(ours, sample_by_diffusers(family, made)) <= 1
    assert distance(reference(family)[0], theirs) > 2


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sd3_without_t5_has_the_pipelines_embeddings(variant: str | None, tmp_path: Path) -> None:
    """Its part is zeros. Saved as a variant, too, weights are found as they are, in shards or not."""
    path = tmp_path / "sd3"
    made = loaded("sd3").pipeline_class.from_pretrained(tiny("sd3"), text_encoder_3=None, tokenizer_3=None)
    made.save_pretrained(path, variant=variant, max_shard_size="20KB")
    assert (variant is None) == (path / "text_encoder" / "model.safetensors").exists()
    assert len(list((path / "transformer").glob("*-of-*.safetensors"))) > 1
    model = load("sd3", path=str(path))
    weights, expected = model.transformer.state_dict(), made.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    model = FlowModel.load(settings("sd3", path=str(path)), "cpu", text_encoders=True)  # as the encoder does
    sequence, _, pooled, _ = made.encode_prompt(
        PROMPTS[0], None, None, do_classifier_free_guidance=False, max_sequence_length=model.text_tokens
    )
    (embedding,) = model.encode(PROMPTS[:1])
    assert torch.equal(embedding.tensors["prompt_embeds"].tensor(), sequence[0])
    assert torch.equal(embedding.tensors["pooled_prompt_embeds"].tensor(), pooled[0])
    with_t5 = embeddings("sd3")[0][0].tensors
    assert all(stored.data.shape == with_t5[name].data.shape for name, stored in embedding.tensors.items())


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
    assert_refused(family, ["model.negative_prompt: 'bad' given", "is distilled"], negative_prompt="bad")


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
    with pytest.raises(ValueError, match=r"^sampler\.steps: 1 given; too few for the pipeline's own grid"):
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


@families
def test_in_bfloat16_rollout_and_learner_agree_to_the_bit(family: str, alone: Any, tmp_path: Path) -> None:
    """With guidance, batches of one and of eight, and a LoRA that has moved."""
    rounded = {"model__dtype": "bfloat16", "learner__micro_batch": 1, "learner__lr": 1e-3}
    for line in alone(**run_settings(family, tmp_path) | rounded).result().lines:
        assert line["mismatch/velocity"] == line["mismatch/log_prob_p99"] == line["mismatch/lost_edges"] == 0
        assert line["learner/ratio_initial_max_dev"] == 0 < line["learner/ratio_max_dev"]
        assert line["watch/trained_modules"] == 1
    assert line["watch/lora_effect"] > 0
    assert line["watch/lora_delivered"] == pytest.approx(1, abs=1e-6)
