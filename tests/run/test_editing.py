"""Each editing family against its pipeline's own call, and runs with source pictures."""

import functools
import itertools
import math
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from g2rpo_ray.actors.workers.encoder import encode_prompts
from g2rpo_ray.commands.demo import Studio
from g2rpo_ray.config import LoraConfig, ModelConfig, load_config
from g2rpo_ray.data import EmbeddingStore, fingerprint
from g2rpo_ray.data.pictures import picture_file, sources_by_prompt, with_sources
from g2rpo_ray.evaluation.adapters import read_adapters
from g2rpo_ray.models import (
    FlowModel,
    add_lora,
    export_lora,
    load_lora,
    lora_shapes,
    lora_state,
    negatives,
    one_prompt,
    qwen_image_21,
)
from g2rpo_ray.models.estimate import count_operations, rollout_memory
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.types import PromptEmbedding, sources_of
from tests.support.runs import dotted
from tests.support.sources import OTHER, TALL, WIDE, picture, png, run_settings
from tests.support.tiny_models import write_tiny

STEPS, SCALE = 3, 2.5
SIDE = 96  # of a source as Qwen-Image-2.1 sees it
FOLDER = tempfile.TemporaryDirectory()
FAMILIES = {
    "flux2_klein": {"negative_prompt": ""},
    "flux2": {},
    "flux_kontext": {"sources": 1, "max_sequence_length": 64},
    "qwen_image_edit_plus": {"negative_prompt": " "},
    "qwen_image_21": {"negative_prompt": " ", "height": 32, "width": 64},
}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def small_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of about a megapixel at which pipelines encode sources, and tiny ones in their place."""
    torch.set_num_threads(1)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 32), (24, 24), (32, 16)])
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 48 * 32)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(qwen_image_21, "SOURCE_SIDE", SIDE)


def settings(family: str, **changes: Any) -> ModelConfig:
    """Of a result that is not square."""
    given = {"path": str(tiny(family)), "dtype": "float32", "height": 16, "width": 24, "guidance_scale": SCALE}
    return ModelConfig(**given | {"sources": 2} | FAMILIES[family] | changes)


@functools.cache
def tiny(family: str) -> Path:
    return write_tiny(family, Path(FOLDER.name) / family)


@functools.cache
def loaded(family: str) -> FlowModel:
    return load(family)


def load(family: str, **changes: Any) -> FlowModel:
    return FlowModel.load(settings(family, **changes), "cpu", vae=True, transformer=True, text_encoders=True)


def encoded(model: FlowModel, text: str, sources: Sequence[Image.Image], negative: str | None) -> PromptEmbedding:
    """As the store gives it: with what it guides away from, which has the same sources."""
    files = [picture_file(png(source), Path()) for source in sources]
    prompt = with_sources(text, files)
    opened = {sources_of(prompt): [file.open() for file in files]}
    (embedding,) = model.encode([prompt], opened)
    if negative is None:
        return embedding
    return replace(embedding, negative=model.encode([negative + sources_of(prompt)], opened, negative=True)[0])


def cases(family: str) -> Iterator[list[tuple[str, list[Image.Image]]]]:
    """Batches: unlike prompts and sources of one size; a source of another size; two of unlike sizes."""
    yield [("make it red", [WIDE]), ("two blue dogs on a very long green sofa", [OTHER])]
    yield [("7", [TALL])]
    if settings(family).sources > 1:
        yield [("put one into the other", [TALL, WIDE])]


@torch.no_grad()
def sample(model: FlowModel, prompts: Sequence[PromptEmbedding], guided: bool) -> torch.Tensor:
    """The last latents, one a prompt, by Euler's method over the pipeline's grid."""
    conditioning = model.condition(prompts, negatives(prompts) if guided else None)
    seeds = range(len(prompts))
    x = torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in seeds])
    for now, then in itertools.pairwise(model.sigmas(STEPS)):
        x = x + (then - now) * model.velocity(x, now.expand(len(x)), conditioning)
    return x


def by_diffusers(model: FlowModel, made: Any, batch: Any, guided: bool) -> tuple[torch.Tensor, np.ndarray]:
    """The same and the images [N, H, W, 3], by a call for each prompt: a call takes one set of sources."""
    config, options, steps, images = model._config, {model.scale_name: SCALE}, [], []
    if config.negative_prompt is not None:
        options[model.scale_name] = SCALE if guided else 1.0
    if config.negative_prompt:  # klein's is always ""
        options["negative_prompt"] = config.negative_prompt
    if type(made).__name__ == "FluxKontextPipeline":
        options["max_area"] = config.height * config.width
    if type(made).__name__ == "QwenImage21Pipeline":
        options["output_resolution"] = SIDE
    else:
        options["max_sequence_length"] = model.text_tokens
    step = made.scheduler.step

    def noted(*given: Any, **named: Any) -> Any:
        steps.append(step(*given, **named)[0])
        return steps[-1:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.scheduler, "step", noted)
        for seed, (text, sources) in enumerate(batch):
            images += list(made(
                image=list(sources) if len(sources) > 1 else sources[0], prompt=text, height=config.height,
                width=config.width, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed),
                output_type="np", **options,
            ).images)  # fmt: skip
    pictures = np.stack(images)
    if pictures.shape[-1] == 4:  # over white
        pictures = pictures[..., :3] * pictures[..., 3:] + 1 - pictures[..., 3:]
    return torch.cat(steps[STEPS - 1 :: STEPS]), pictures


@functools.cache
def pipeline(family: str) -> Any:
    made = loaded(family).pipeline_class.from_pretrained(tiny(family))
    made.set_progress_bar_config(disable=True)
    return made


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@families
def test_edited_images_are_those_of_the_pipeline(family: str) -> None:
    """Batches, guided and not; each source and each size of it matters a hundred times more than what is allowed."""
    model, negative = loaded(family), settings(family).negative_prompt
    for batch in cases(family):
        prompts = [encoded(model, text, sources, negative) for text, sources in batch]
        for guided in [True, False] if negative is not None else [False]:
            latents, images = by_diffusers(model, pipeline(family), batch, guided)
            ours = sample(model, prompts, guided)
            assert error(ours, latents) <= 1e-5, (batch[0][0], guided)
            assert np.abs(model.decode(ours).numpy() / 255 - images).max() <= 1 / 255
            text, sources = batch[0]
            for changed in ([OTHER if source is not OTHER else WIDE for source in sources], [*sources[:-1], TALL]):
                if changed != sources:
                    other = sample(model, [encoded(model, text, changed, negative)], guided)
                    assert error(other, latents[:1]) > 1e-3


@families
def test_the_adapter_is_the_pipeline_s_and_what_rollout_saves_changes_nothing(family: str, tmp_path: Path) -> None:
    model, negative, lora = load(family), settings(family).negative_prompt, LoraConfig(rank=2, alpha=2)
    add_lora(model.transformer, lora, seed=0)
    rng = np.random.default_rng(1)
    state = {name: rng.normal(0, 0.2, a.shape).astype(np.float32) for name, a in lora_state(model.transformer).items()}
    assert {name: array.shape for name, array in state.items()} == lora_shapes(settings(family), lora)
    load_lora(model.transformer, state)
    export_lora(tmp_path, state, lora, model.pipeline_class)
    (batch, *_), made = cases(family), model.pipeline_class.from_pretrained(tiny(family))
    made.set_progress_bar_config(disable=True)
    made.load_lora_weights(tmp_path)
    prompts = [encoded(model, text, sources, negative) for text, sources in batch]
    ours = sample(model, prompts, guided=False)
    assert error(ours, by_diffusers(model, made, batch, guided=False)[0]) <= 1e-5
    assert error(ours, by_diffusers(model, pipeline(family), batch, guided=False)[0]) > 1e-3
    with torch.inference_mode(), one_prompt(model.transformer):
        assert error(sample(model, prompts[:1], guided=False), ours[:1]) <= 1e-5


@families
def test_memory_and_operations_count_the_sources(family: str) -> None:
    """A source of the result's size is as many tokens as the result."""
    few, many = (load_config().model_copy(update={"model": settings(family, sources=n), "lora": LoraConfig(rank=2)})
                 for n in ((0, 1) if family == "flux_kontext" else (1, 2)))  # fmt: skip
    assert count_operations(few).evaluation < count_operations(many).evaluation < 2.5 * count_operations(few).evaluation
    needed, more = rollout_memory(few), rollout_memory(many)
    assert needed["velocity"] < more["velocity"]
    assert needed["weights"] == more["weights"]


@torch.no_grad()
def test_qwen_image_21_evaluates_prompts_of_one_length_together_or_each_alone_where_a_call_is_a_collective() -> None:
    model, calls = load("qwen_image_21"), []
    texts = ["make it red", "two blue dogs on a very long green sofa", "make it one"]
    prompts = [encoded(model, text, [WIDE], None) for text in texts]
    x = torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(3)])
    sigma, conditioning = torch.tensor([1.0, 0.7, 0.2]), model.condition(prompts)
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    alone = [model.velocity(x[[at]], sigma[[at]], model.condition([prompt])) for at, prompt in enumerate(prompts)]
    expected = torch.cat(alone)
    for collective, number in ((False, 2), (True, 3)):
        calls.clear()
        model.collective = collective
        torch.testing.assert_close(model.velocity(x, sigma, conditioning), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == number


def test_the_grid_of_a_qwen_image_21_that_has_one_is_its_own_and_of_no_other_number_of_steps(tmp_path: Path) -> None:
    made, own = pipeline("qwen_image_21"), [1.0, 0.6, 0.3]
    type(made)(**made.components, sample_sigmas=own).save_pretrained(tmp_path)
    model = FlowModel.load(settings("qwen_image_21", path=str(tmp_path)), "cpu")
    scheduler = made.scheduler
    scheduler.set_timesteps(sigmas=own, mu=model._mu(3))
    assert torch.equal(model.sigmas(3), scheduler.sigmas)
    with pytest.raises(ValueError, match=r"^sampler\.steps: 4 given; the pipeline's own grid has 3 steps"):
        model.sigmas(4)


def test_qwen_image_21_reads_a_prompt_to_its_end_where_no_length_is_set() -> None:
    long = "y" * 700
    one, other = loaded("qwen_image_21").encode([long + "a", long + "b"])
    assert len(one.tensors["prompt_embeds"].data) > 700
    assert not np.array_equal(one.tensors["prompt_embeds"].data, other.tensors["prompt_embeds"].data)
    assert loaded("qwen_image_21").take_cut_message() == ""


def test_sources_that_a_pipeline_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.sources: 2 given; a FluxKontextPipeline takes 0 to 1 source"):
        FlowModel.load(settings("flux_kontext", sources=2), "cpu")
    with pytest.raises(ValueError, match=r"^model\.sources: 0 given; a QwenImageEditPlusPipeline takes 1 to 10"):
        FlowModel.load(settings("qwen_image_edit_plus", sources=0), "cpu")
    with pytest.raises(ValueError, match=r"^model\.sources: 1 given; a FluxPipeline takes 0 to 0 source"):
        FlowModel.load(load_config(None, ["model.sources=1"]).model, "cpu")
    with pytest.raises(ValueError, match=r"^model\.sources: the prompt 'make it red' has 0 source images; a Qwen"):
        loaded("qwen_image_edit_plus").encode(["make it red"])
    with pytest.raises(ValueError, match=r"Image too small: 48×64"):
        encoded(loaded("flux2_klein"), "make it red", [picture(48, 64, 0)], None)


def test_rollout_and_learner_agree_on_edits(alone: Any, tmp_path: Path) -> None:
    """States whose sources have unlike sizes meet in no pass; a batch of equal sizes is guided away from each's own."""
    for line in alone(**run_settings(tmp_path, tiny("flux2_klein"))).result().lines:
        assert line["mismatch/velocity"] < 1e-5
        assert line["learner/ratio_initial_max_dev"] == 0 < line["learner/ratio_max_dev"]
        assert line["watch/trained_modules"] == 1
    stored = pa.concat_tables([pq.read_table(file) for file in (tmp_path / "embeddings").rglob("*.parquet")])
    found = sorted(zip(stored["role"].to_pylist(), stored["prompt"].to_pylist(), strict=True))
    assert len(found) == len(set(found)) == 5 + 4  # the negative prompt with each of three sources, and alone
    assert sum(role == "negative" for role, _ in found) == 4


def test_edits_in_bfloat16_start_at_a_ratio_of_one(alone: Any, tmp_path: Path) -> None:
    for line in alone(**run_settings(tmp_path, tiny("flux2_klein")), model__dtype="bfloat16").result().lines:
        assert line["mismatch/velocity"] < 0.02
        assert line["learner/ratio_initial_max_dev"] == 0 < line["learner/ratio_max_dev"]


def test_the_demo_edits_a_picture_and_scores_what_it_left(tmp_path: Path) -> None:
    given = dotted(run_settings(tmp_path, tiny("flux2_klein")) | {"rewards__preference__kind": "preservation"})
    config = load_config(None, [f"{key}={value}" for key, value in given.items()])
    studio = Studio(config, read_adapters((), config))
    one, other = (studio.draw("make it red", 0, 2, 1.0, str(tmp_path / "pictures" / f"{name}.png"))[0]
                  for name in ("wide", "other"))  # fmt: skip
    assert (one.picture != other.picture).any()
    fitted = np.asarray(WIDE.resize((24, 16), Image.Resampling.BICUBIC)).astype(float)
    assert one.scores["preference"] == pytest.approx(1 - np.abs(fitted - one.picture).mean() / 255, abs=1e-5)
    assert math.isnan(studio.draw("make it red", 0, 2, 1.0)[0].scores["preference"])  # it has no source


def test_the_encoder_stores_sources_with_prompts_and_negative_prompts_once(tmp_path: Path) -> None:
    given = dotted(run_settings(tmp_path, tiny("flux2_klein")))
    config = load_config(None, [f"{key}={value}" for key, value in given.items()])
    prompts = read_run_prompts(config)
    sources = pickle.loads(pickle.dumps(sources_by_prompt(prompts.metadata)))  # as they reach another process
    told = list(encode_prompts(config, str(tmp_path / "store"), prompts.train, sources))
    assert [part.missing for part in told] == [4, 0, 4, 4]  # before, the negative prompts, all, the end
    store = EmbeddingStore(tmp_path / "store", fingerprint(config.model))
    found = store.get(prompts.train, config.model.negative_prompt)
    for embedding in found:
        has = "source_latents" in embedding.tensors
        assert has == bool(sources_of(embedding.prompt)) == ("source_latents" in embedding.negative.tensors)
        assert sources_of(embedding.negative.prompt) == sources_of(embedding.prompt)
    assert [part.missing for part in encode_prompts(config, str(tmp_path / "store"), prompts.train)] == [0]
    text = config.model.model_copy(update={"sources": 0})
    assert fingerprint(text) != fingerprint(config.model)  # the VAE encodes sources


@families
def test_the_size_of_a_source_may_be_given(family: str) -> None:
    """In place of the pipeline's constant, with the same tokens; a fingerprint tells both apart."""
    area = {"qwen_image_edit_plus": 48 * 32, "qwen_image_21": SIDE * SIDE}.get(family, 2048)
    found = [loaded(family), load(family, source_area=area), load(family, source_area=4 * area)]
    usual, given, large = (
        encoded(model, "make it red", [WIDE], None).tensors["source_latents"].data for model in found
    )
    if family.startswith("qwen"):
        assert np.array_equal(usual, given)
    assert len(given) * 2 < len(large) <= 8 * len(given)
    assert fingerprint(settings(family)) != fingerprint(settings(family, source_area=area))
