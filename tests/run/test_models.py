"""FLUX.1 against diffusers' own FluxPipeline, on a tiny random pipeline."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from g2rpo_ray.config import LoraConfig, ModelConfig
from g2rpo_ray.models import FlowModel, add_lora, lora_parameters
from tests.support.tiny_flux import SIZE_MULTIPLE, write_tiny_flux

PROMPTS = ["a red cat", "two blue dogs on a very long green sofa", "7"]

STEPS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # on tiny matrices threads cost far more than they give
    return write_tiny_flux(tmp_path_factory.mktemp("tiny_flux"))


def settings(path: Path, **changes: Any) -> ModelConfig:
    values = {"dtype": "float32", "height": 16, "width": 24, "max_sequence_length": 12, "guidance_scale": 2.5}
    return ModelConfig(path=str(path), **{**values, **changes})


def load(path: Path, **changes: Any) -> FlowModel:
    return FlowModel.load(settings(path, **changes), "cpu", vae=True, transformer=True, text_encoders=True)


@pytest.fixture(scope="module")
def model(tiny: Path) -> FlowModel:
    return load(tiny)


def noise(model: FlowModel, seeds: range) -> torch.Tensor:
    return torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(model: FlowModel, prompts: list[str], x: torch.Tensor, shift: float) -> np.ndarray:
    conditioning = model.condition(model.encode(prompts))
    t = 1 - torch.arange(STEPS + 1) / STEPS
    sigmas = shift * t / (1 + (shift - 1) * t)
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * model.velocity(x, now.expand(len(x)), conditioning)
    return model.decode(x).numpy()


def sample_by_diffusers(path: Path, scheduler: dict[str, Any], x: torch.Tensor) -> np.ndarray:
    pipeline: Any = FluxPipeline.from_pretrained(path)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        height=16,
        width=24,
        num_inference_steps=STEPS,
        guidance_scale=2.5,
        max_sequence_length=12,
        latents=x,
        output_type="np",
    ).images
    return np.asarray(images)


def dynamic_shift(tokens: int) -> float:
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape == (len(PROMPTS), 16, 24, 3)
    assert theirs.std() > 0.05  # not one colour, which would be equal for nothing
    assert np.abs(ours / 255 - theirs).max() <= 1 / 255


def test_images_are_those_of_diffusers_with_static_shift(tiny: Path, model: FlowModel) -> None:
    x = noise(model, range(3))
    assert_same_images(sample(model, PROMPTS, x, 3.0), sample_by_diffusers(tiny, {"shift": 3.0}, x))


def test_images_are_those_of_diffusers_with_dynamic_shift(tiny: Path, model: FlowModel) -> None:
    x = noise(model, range(3))
    theirs = sample_by_diffusers(tiny, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, x)
    assert_same_images(sample(model, PROMPTS, x, dynamic_shift(model.image_tokens)), theirs)


def test_images_are_those_of_diffusers_without_guidance(tmp_path: Path) -> None:
    path = write_tiny_flux(tmp_path, guidance_embeds=False)
    model = load(path)
    x = noise(model, range(3))
    assert_same_images(sample(model, PROMPTS, x, 3.0), sample_by_diffusers(path, {"shift": 3.0}, x))


def test_guidance_scale_matters_to_a_guided_model(tiny: Path, model: FlowModel) -> None:
    x = noise(model, range(1))
    other = sample(load(tiny, guidance_scale=7.0), PROMPTS[:1], x, 3.0)
    assert (other != sample(model, PROMPTS[:1], x, 3.0)).any()


def test_initial_noise_is_what_the_pipeline_draws(tiny: Path, model: FlowModel) -> None:
    pipeline: Any = FluxPipeline.from_pretrained(tiny)
    generator = torch.Generator().manual_seed(5)
    theirs, _ = pipeline.prepare_latents(1, 4, 16, 24, torch.float32, "cpu", generator)
    assert torch.equal(noise(model, range(5, 6)), theirs)
    assert model.latent_shape == (4 * 6, 16)
    assert model.image_tokens == 4 * 6


def test_velocity_does_not_depend_on_the_rest_of_the_batch(model: FlowModel) -> None:
    x, sigma = noise(model, range(3)), torch.tensor([1.0, 0.73, 0.1])
    embeddings = model.encode(PROMPTS)
    together = model.velocity(x, sigma, model.condition(embeddings))
    for i, embedding in enumerate(embeddings):
        alone = model.velocity(x[i : i + 1], sigma[i : i + 1], model.condition([embedding]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert together.dtype == torch.float32
    assert not torch.allclose(*model.velocity(x[:1].expand(2, -1, -1), sigma[:2], model.condition(embeddings[:1])))


def test_one_prompt_serves_all_latents(model: FlowModel) -> None:
    x, sigma = noise(model, range(3)), torch.full((3,), 0.5)
    (embedding,) = model.encode(PROMPTS[:1])
    shared = model.velocity(x, sigma, model.condition([embedding]))
    torch.testing.assert_close(shared, model.velocity(x, sigma, model.condition([embedding] * 3)), rtol=0, atol=1e-6)


def test_sigma_is_not_rounded(model: FlowModel) -> None:
    x = noise(model, range(1)).expand(2, -1, -1)
    conditioning = model.condition(model.encode(PROMPTS[:1]))
    a, b = model.velocity(x, torch.tensor([0.5, 0.5002]), conditioning)  # equal when rounded to 1/1000
    assert (a - b).abs().max() > 1e-6


def test_an_embedding_does_not_depend_on_its_neighbours(model: FlowModel) -> None:
    for alone, among in zip([model.encode([p])[0] for p in PROMPTS], model.encode(PROMPTS), strict=True):
        assert alone.prompt == among.prompt
        for name, tensor in alone.tensors.items():
            assert np.array_equal(tensor.data, among.tensors[name].data)
    assert {name: tensor.data.shape for name, tensor in among.tensors.items()} == model.embedding_shapes()
    assert model.embedding_shapes() == {"prompt_embeds": (12, 16), "pooled_prompt_embeds": (16,)}


def test_a_picture_depends_on_its_neighbours_by_rounding_alone(model: FlowModel) -> None:
    x = noise(model, range(3))
    together, alone = model.decode(x)[1:2].int(), model.decode(x[1:2]).int()
    assert (together - alone).abs().max() <= 1


def test_half_precision_stays_inside(tiny: Path, model: FlowModel) -> None:
    half = load(tiny, dtype="bfloat16")
    (embedding,) = half.encode(PROMPTS[:1])
    pooled = embedding.tensors["pooled_prompt_embeds"]
    assert (pooled.dtype, pooled.data.dtype) == ("bfloat16", np.int16)
    pooled.data.setflags(write=False)  # as out of Ray's object store
    conditioning = half.condition([embedding])
    assert conditioning.prompt["encoder_hidden_states"].dtype == torch.bfloat16
    x, sigma = noise(half, range(2)), torch.tensor([0.9, 0.3])
    v = half.velocity(x, sigma, conditioning)
    assert v.dtype == torch.float32
    exact = model.velocity(x, sigma, model.condition(model.encode(PROMPTS[:1])))
    assert (v - exact).abs().max() < 0.1 * exact.abs().max()
    assert half.decode(x).dtype == torch.uint8


def test_bfloat16_base_with_float32_lora_trains(tiny: Path) -> None:
    model = load(tiny, dtype="bfloat16")
    add_lora(model.transformer, LoraConfig(rank=2), seed=0)
    x, sigma = noise(model, range(2)), torch.tensor([0.9, 0.3])
    conditioning = model.condition(model.encode(PROMPTS[:2]))
    model.velocity(x, sigma, conditioning).square().mean().backward()
    for name, parameter in lora_parameters(model.transformer).items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert name.endswith("A.weight") or parameter.grad.abs().max() > 0, name  # A has none while B is 0
    assert all(p.grad is None for n, p in model.transformer.named_parameters() if "lora" not in n)


def test_only_the_parts_asked_for_are_loaded_and_frozen(tiny: Path) -> None:
    model = FlowModel.load(settings(tiny), "cpu", transformer=True)
    parts = {name for name, part in model._pipeline.components.items() if part is not None}
    assert parts == {"transformer", "scheduler"}
    assert model.latent_shape == (24, 16)
    assert not any(p.requires_grad for p in model.transformer.parameters())
    assert not model.transformer.training
    assert FlowModel.load(settings(tiny), "cpu", vae=True).decode(torch.zeros(1, 24, 16)).shape == (1, 16, 24, 3)


def test_loading_no_part_checks_the_settings(tiny: Path) -> None:
    assert FlowModel.load(settings(tiny, width=32), "cpu").latent_shape == (4 * 8, 16)


def test_a_subset_of_the_folders_is_not_enough(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "part", ignore=shutil.ignore_patterns("text_encoder_2"))
    assert_load_error(tmp_path / "part", "model.path: cannot load", "text_encoder_2")


def test_what_is_not_a_flux_pipeline_is_refused(tiny: Path, tmp_path: Path) -> None:
    assert_load_error(tmp_path / "nowhere", "model.path: cannot load", "nowhere", "hub")
    (tmp_path / "other").mkdir()
    assert_load_error(tmp_path / "other", "model.path: cannot load", "model_index.json")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert_load_error(tmp_path / "other", "model.path: cannot load", "StableDiffusionPipeline", "FluxPipeline")
    shutil.copytree(tiny, tmp_path / "torn")
    weights = tmp_path / "torn" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_load_error(tmp_path / "torn", "model.path: cannot load", "torn")


def test_a_hub_that_cannot_be_reached_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_load_error(Path("nobody/no-such-flux"), "model.path: cannot load 'nobody/no-such-flux'", "hub")


def test_sizes_and_attention_backends_are_checked(tiny: Path) -> None:
    assert_load_error(tiny, f"model.height: 18 given; must be a multiple of {SIZE_MULTIPLE}", "16 or 20", height=18)
    assert_load_error(tiny, "model.width: 2 given", "4 or 8", width=2)
    assert_load_error(tiny, "model.attention_backend: 'warp' given", "native", attention_backend="warp")


def test_an_attention_backend_can_be_chosen(tiny: Path, model: FlowModel) -> None:
    math_only = load(tiny, attention_backend="_native_math")
    x, sigma = noise(model, range(1)), torch.tensor([0.4])
    conditioning = model.condition(model.encode(PROMPTS[:1]))
    expected = model.velocity(x, sigma, conditioning)
    torch.testing.assert_close(math_only.velocity(x, sigma, conditioning), expected, rtol=1e-5, atol=1e-5)
    math_only.transformer.reset_attention_backend()


def assert_load_error(path: Path, *words: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=r"^model\.") as error:
        load(path, **changes)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_pipeline_saved_in_4_bits_is_refused(part: str, tiny: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny, tmp_path / "tiny")
    file = path / part / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantized}))
    words = rf"^model\.path: .* quantized weights \(bitsandbytes, load_in_4bit\) in {part}; give the original pipeline"
    with pytest.raises(ValueError, match=words) as error:
        FlowModel.load(settings(path), "cpu")
    assert "\n" not in str(error.value)
