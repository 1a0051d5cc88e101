"""The world `edit_quickstart`: rules are right of what is drawn, and the committed model is as its README says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from g2rpo_ray.config import load_config
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.rewards import build_reward
from g2rpo_ray.types import text_of
from g2rpo_ray.world_builder.edit_quickstart import WORLD
from g2rpo_ray.world_builder.editing import encode_instructions, encode_pictures, sample_edits
from g2rpo_ray.worlds.edit_quickstart.draw import EDITS, THINGS, Edit, Thing, draw, draw_jitter, edited, parse
from g2rpo_ray.worlds.edit_quickstart.rules import check_prompt, seen

THING = Thing("red", "star", "top left")


def scores(source: np.ndarray, result: np.ndarray, edit: Edit | str) -> tuple[float, float]:
    known = [{"source": (source,)}]
    done, kept = (build_reward(kind).score(result[None], [str(edit)], known) for kind in ("edit_done", "rest_kept"))
    return float(done[0]), float(kept[0])


def test_rules_are_right_of_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    for thing in [THINGS[at] for at in rng.permutation(len(THINGS))[:60]]:
        jitter, other = draw_jitter(rng), draw_jitter(rng)
        edit, second = (EDITS[at] for at in rng.choice(len(EDITS), 2, replace=False))
        source = draw(thing, jitter)
        assert seen(source) == thing._asdict()
        assert scores(source, draw(edited(thing, edit), jitter), edit) == (1, 1)
        assert scores(source, draw(edited(thing, edit), other), edit) == (1, 1)  # pixels may move, what is seen not
        assert scores(source, source, edit) == (edited(thing, edit) == thing, 1)
        if second.attribute != edit.attribute and edited(thing, second) != thing:
            assert scores(source, draw(edited(edited(thing, edit), second), jitter), edit) == (1, 0)


def test_a_picture_of_nothing_or_of_two_things_has_done_and_kept_nothing() -> None:
    jitter, edit = (0.0, 0.0, 10.0), Edit("place", "top right")
    source, moved = draw(THING, jitter), draw(edited(THING, edit), jitter)
    assert scores(source, moved, edit) == (1, 1)
    assert scores(source, np.maximum(source, moved), edit) == (0, 0)
    assert scores(source, np.full_like(source, 48), edit) == (0, 0)
    assert scores(source, np.roll(source, 12, 1), edit) == (0, 0)  # between two quarters


def test_a_text_that_is_no_instruction_has_no_score() -> None:
    source = draw(THING, (0.0, 0.0, 10.0))
    assert all(parse(str(edit)) == edit for edit in EDITS)
    assert parse("Move it  to the TOP right") == Edit("place", "top right")
    assert np.isnan(scores(source, source, "a red star")).all()
    with pytest.raises(ValueError, match="is not an instruction of edit_quickstart, such as 'make it red'"):
        check_prompt("a red star", {"source": (source,)})
    with pytest.raises(ValueError, match=r"has no source picture, .*; set model\.sources"):
        check_prompt("make it red", {})


def test_the_prompts_are_those_of_the_builder_and_no_held_out_pair_is_trained_on(tmp_path: Path) -> None:
    WORLD.prompts(tmp_path)
    prompts, pairs = read_run_prompts(load_config("edit_quickstart")), []
    for split, names in (("train", prompts.train), ("heldout", prompts.heldout)):
        file = f"prompts_{split}.jsonl"
        assert (WORLD.root / file).read_bytes() == (tmp_path / file).read_bytes()
        shown = [seen(np.asarray(prompts.metadata[name]["source"][0].open())) for name in names]
        for name, thing in zip(names, shown, strict=True):
            edit = parse(text_of(name))
            assert thing[edit.attribute] not in (edit.value, None)
        pairs.append({(thing["colour"], thing["shape"]) for thing in shown})
    assert (len(prompts.train), len(prompts.heldout)) == (96, 32)
    assert not pairs[0] & pairs[1]


@pytest.fixture(scope="module")
def committed() -> Flux2KleinPipeline:
    torch.set_num_threads(1)
    pipeline = Flux2KleinPipeline.from_pretrained(WORLD.root / "pipeline", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_builder_samples_as_the_pipeline_does(committed: Flux2KleinPipeline) -> None:
    sources, texts = WORLD.examples()
    source = encode_pictures(committed, sources[:1])
    ours = sample_edits(committed, source, encode_instructions(WORLD, committed, texts[:1]), seed=3)[0]
    theirs = committed(
        image=Image.fromarray(sources[0]), prompt=texts[0], height=64, width=64, num_inference_steps=10,
        generator=torch.Generator().manual_seed(3), max_sequence_length=WORLD.tokens, output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(ours - theirs * 255).max() <= 1.5
