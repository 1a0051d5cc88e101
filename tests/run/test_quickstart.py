"""The embedded default as it lies in the package: complete, small, and as good as its README says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from g2rpo_ray.rewards import build_reward
from g2rpo_ray.world_builder.pipeline import sample
from g2rpo_ray.world_builder.quickstart import CAPTIONS, rendered_dataset
from g2rpo_ray.worlds.quickstart import (
    HELDOUT_PROMPTS,
    PIPELINE_DIR,
    PREFERENCE_ARCHITECTURE,
    PREFERENCE_CHECKPOINT,
    ROOT,
    TRAIN_PROMPTS,
)
from g2rpo_ray.worlds.quickstart.quality import quality
from g2rpo_ray.worlds.quickstart.shapes import COLOURS, SHAPES, caption, parse, render


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return FluxPipeline.from_pretrained(PIPELINE_DIR, local_files_only=True)


def _prompts(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_prompts_are_disjoint_and_heldout_only_in_combination() -> None:
    train = {parse(prompt) for prompt in _prompts(TRAIN_PROMPTS)}
    heldout = {parse(prompt) for prompt in _prompts(HELDOUT_PROMPTS)}
    assert len(train) == 36
    assert len(heldout) == 12
    assert not train & heldout
    for pairs in (train, heldout):
        assert {colour for colour, _ in pairs} == set(COLOURS)
        assert {shape for _, shape in pairs} == set(SHAPES)


def test_parse_inverts_caption_and_refuses_anything_else() -> None:
    assert all(parse(caption(colour, shape)) == (colour, shape) for colour in COLOURS for shape in SHAPES)
    assert parse("A photo of a Blue star.") == ("blue", "star")
    for prompt in ("a red", "a circle", "a red blue circle", "a red circle and a ring", ""):
        with pytest.raises(ValueError, match="exactly one colour"):
            parse(prompt)


def test_render_depends_on_its_generator_alone() -> None:
    first, second = (render("green", "star", np.random.default_rng(5)) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.shape == (32, 32, 3)
    np.testing.assert_array_equal(first, second)
    assert (first != render("green", "star", np.random.default_rng(6))).any()


def test_committed_files_are_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 16e6


def test_pipeline_is_flux_in_small(pipeline: FluxPipeline) -> None:
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.transformer.dtype == torch.float32
    assert sum(tensor.numel() for tensor in pipeline.transformer.parameters()) < 1_000_000
    assert pipeline.scheduler.config.shift == 3.0
    assert not pipeline.scheduler.config.use_dynamic_shifting
    tokens, pooled, _ = pipeline.encode_prompt(list(CAPTIONS), None, max_sequence_length=16)
    assert tokens.shape[:2] == (48, 16)
    assert len(pooled.unique(dim=0)) == 48


def test_words_outside_the_vocabulary_still_encode(pipeline: FluxPipeline) -> None:
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        ids = tokenizer("zebra, number 7!").input_ids
        assert 3 < len(ids) <= 40
        assert ids.count(tokenizer.eos_token_id) == 1


def test_base_leaves_room_for_rl_and_truth_is_near_one(pipeline: FluxPipeline) -> None:
    prompts = _prompts(HELDOUT_PROMPTS) * 8
    preference = build_reward("hpsv2", checkpoint=str(PREFERENCE_CHECKPOINT), architecture=str(PREFERENCE_ARCHITECTURE))
    rng = np.random.default_rng(0)
    truth = preference.score(np.stack([render(*parse(prompt), rng) for prompt in prompts]), prompts)
    pictures = sample(pipeline, prompts, seed=0)
    base = preference.score(pictures, prompts)
    right = build_reward("shape_accuracy").score(pictures, prompts) == 1
    assert truth.mean() > 0.97
    assert 0.78 < base.mean() < 0.92
    assert 0.6 < right.mean() < 0.9
    assert base[right].mean() > base[~right].mean() + 0.15


def test_quality_is_one_for_the_truth_and_grades_the_rest() -> None:
    images, caption_index = rendered_dataset(per_caption=1, seed=3)
    scores = quality(images)
    own = scores[torch.arange(48), caption_index]
    assert own.min() > 0.98
    assert (scores.argmax(dim=1) == caption_index).all()
    noisy = np.clip(images + np.random.default_rng(0).normal(scale=60, size=images.shape), 0, 255).astype(np.uint8)
    assert quality(noisy)[torch.arange(48), caption_index].max() < 0.8
