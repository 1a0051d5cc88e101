"""The world `scenes`: what is drawn is seen, what is wrong is told, and the committed models are as its README says."""

import dataclasses
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from g2rpo_ray.config import load_config
from g2rpo_ray.rewards import build_reward
from g2rpo_ray.world_builder.build import build, build_pipeline
from g2rpo_ray.world_builder.build import main as build_main
from g2rpo_ray.world_builder.measure import main as measure_main
from g2rpo_ray.world_builder.scenes import WORLD, drawn
from g2rpo_ray.worlds.scenes.draw import COLOURS, RELATIONS, SHAPES, Kind, Scene, all_scenes, caption, parse, render
from g2rpo_ray.worlds.scenes.quality import encode, quality, seen_in
from tests.support.runs import fill, small_disk

RULES = ("attributes", "relation", "count", "correct")

SCENE = Scene(2, Kind("small", "red", "circle"), "left of", Kind("large", "blue", "square"))

WRONG = {
    "attributes": SCENE._replace(first=Kind("large", "red", "circle")),
    "relation": SCENE._replace(relation="right of"),
    "count": SCENE._replace(number=3),
}


def _some(number: int, seed: int) -> list[Scene]:
    scenes = list(all_scenes())
    return [scenes[at] for at in np.random.default_rng(seed).integers(len(scenes), size=number)]


def _score(kind: str, images: np.ndarray, scenes: list[Scene]) -> np.ndarray:
    return build_reward(f"scenes_{kind}").score(images, [caption(scene) for scene in scenes])


def test_a_caption_names_one_scene_and_nothing_else_does():
    assert len(all_scenes()) == len({caption(scene) for scene in all_scenes()}) == 26_496
    assert caption(SCENE) == "two small red circles left of one large blue square"
    assert all(parse(caption(scene)) == scene for scene in _some(500, seed=0))
    assert parse("Two small red circles left of one large blue square.") == SCENE
    for prompt in ("", "a red circle", "one small red circle above one small red circle"):
        with pytest.raises(ValueError, match="names no scene; one is"):
            parse(prompt)
    assert np.isnan(build_reward("scenes_correct").score(np.zeros((1, 48, 48, 3), np.uint8), ["a cat"]))


def test_pictures_depend_on_their_generator_alone_and_on_no_other_in_a_batch_of_rules():
    scenes = _some(70, seed=1)
    first, second = (render(scenes, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    together = _score("correct", first, scenes)
    alone = [_score("correct", first[at : at + 1], scenes[at : at + 1])[0] for at in range(0, 70, 10)]
    np.testing.assert_array_equal(together[::10], alone)


def test_rules_are_right_of_what_is_drawn_and_deny_what_is_not():
    scenes = _some(400, seed=2)
    images = render(scenes, np.random.default_rng(0))
    for rule in RULES:
        assert _score(rule, images, scenes).mean() > 0.98
        assert _score(rule, images, scenes[1:] + scenes[:1]).mean() < 0.05


@pytest.mark.parametrize("rule", WRONG)
def test_each_rule_denies_what_it_is_about_and_no_more(rule):
    images = render([WRONG[rule]] * 30, np.random.default_rng(1))
    denied = {other: float(_score(other, images, [SCENE] * 30).mean()) for other in RULES}
    assert denied == {other: float(other not in (rule, "correct")) for other in RULES}


def test_a_colour_or_shape_that_is_not_there_denies_all():
    for kind in (Kind("small", "green", "circle"), Kind("small", "red", "cross")):
        images = render([SCENE._replace(first=kind)] * 10, np.random.default_rng(2))
        assert all(_score(rule, images, [SCENE] * 10).max() == 0 for rule in RULES)


def test_quality_by_hand():
    images = render([SCENE], np.random.default_rng(3))
    said = encode(
        [
            SCENE,
            SCENE._replace(first=Kind("large", "red", "circle")),  # two of three have 0.8 of what they should
            SCENE._replace(second=Kind("large", "green", "square")),  # one of three has 0.6
            SCENE._replace(relation="right of"),  # two of three are on the wrong side
            SCENE._replace(number=3),  # one of four is missing
            SCENE._replace(number=1),  # one is superfluous
        ]
    )
    expected = [1, (2 * 0.8 + 1) / 3, (2 + 0.6) / 3, (2 * 0.6 + 1) / 3, 3 / 4, 0.9]
    torch.testing.assert_close(quality(seen_in(images), said)[0], torch.tensor(expected))
    np.testing.assert_allclose(WORLD.grade(images, [caption(SCENE._replace(number=3))]), [3 / 4])


def test_committed_files_are_small():
    assert sum(path.stat().st_size for path in WORLD.root.rglob("*") if path.is_file()) < 16e6


def test_its_configuration_is_read_and_names_rewards_of_its_own():
    config = load_config(WORLD.config)
    assert config.name == "scenes"
    assert list(config.rewards) == ["preference"]
    kinds = {reward.kind for reward in config.eval_rewards.values()}
    assert kinds == {f"scenes_{name}" for name in (*RULES, "quality", "background")}


def test_fidelity_tells_spoilt_objects_from_a_spoilt_background():
    scenes = _some(100, seed=4)
    images = render(scenes, np.random.default_rng(4))
    noise = np.random.default_rng(5).normal(scale=12, size=images.shape)
    bright = images.max(axis=3, keepdims=True) > 130
    spoilt = {"quality": bright, "background": ~bright}
    for name, where in spoilt.items():
        worse = np.clip(images + noise * where * (4 if name == "quality" else 1), 0, 255).astype(np.uint8)
        falls = {other: (_score(other, images, scenes) - _score(other, worse, scenes)).mean() for other in spoilt}
        assert falls[name] > 0.1
        assert all(fall < 0.1 * falls[name] + 0.03 for other, fall in falls.items() if other != name)


def test_prompts_are_disjoint_and_name_everything():
    train, heldout = WORLD.prompts()
    assert (len(train), len(heldout)) == (512, 128)
    assert not set(train) & set(heldout)
    for split, prompts in (("train", train), ("heldout", heldout)):
        assert (WORLD.root / f"prompts_{split}.txt").read_text().splitlines() == prompts
        scenes = [parse(prompt) for prompt in prompts]
        assert {scene.relation for scene in scenes} == set(RELATIONS)
        for kinds in ({scene.first for scene in scenes}, {scene.second for scene in scenes}):
            assert {kind.colour for kind in kinds} == set(COLOURS)
            assert {kind.shape for kind in kinds} == set(SHAPES)


def _digest(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


TINY = dataclasses.replace(
    WORLD,
    transformer={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
    preference={
        "embed_dim": 32,
        "vision_cfg": WORLD.preference["vision_cfg"] | {"layers": 1, "width": 32},
        "text_cfg": WORLD.preference["text_cfg"] | {"layers": 1, "width": 32},
    },
    mixed_precision=False,  # bfloat16 is slow on a CPU without its instructions
    prompts=lambda: tuple(prompts[:4] for prompts in WORLD.prompts()),
    pictures=lambda: drawn(32, 0),
    lesson=lambda: (drawn(32, 1)[0], torch.randperm(32)),
    autoencoder_steps=2,
    autoencoder_batch=4,
    transformer_steps=2,
    transformer_batch=4,
    preference_steps=2,
    watched={1: WORLD.finished[:2]},
    finished=WORLD.finished[:2],
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a tiny build."""
    build(TINY, folder := tmp_path_factory.mktemp("built"))
    return folder


def test_a_build_makes_the_same_files_again(built, tmp_path):
    build(TINY, tmp_path)
    assert _digest(tmp_path) == _digest(built)
    assert {"preference.pt", "prompts_train.txt", "pipeline/model_index.json"} < set(_digest(built))


def test_a_build_that_is_stopped_leaves_what_was_there(built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    before = _digest(tmp_path)

    def stopped() -> tuple[np.ndarray, torch.Tensor]:
        assert len(list(tmp_path.glob("building-*/pipeline/model_index.json"))) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(dataclasses.replace(TINY, autoencoder_steps=3, lesson=stopped), tmp_path)
    assert _digest(tmp_path) == before


@pytest.mark.parametrize(
    ("main", "arguments", "parts"),
    [
        (build_main, ["--output", "/dev/null/x"], ["--output: cannot write to /dev/null/x: Not a directory"]),
        (measure_main, ["/dev/null"], ["DIR: /dev/null has no pipeline/model_index.json; give the --output of a"]),
    ],
)
def test_a_place_that_cannot_be_written_or_measured_is_told_in_a_line(main, arguments, parts, capsys):
    assert main(["scenes", *arguments]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    for part in ("error: ", *parts):
        assert part in printed


def test_a_build_is_told_at_once_that_there_is_no_room(tmp_path, capsys):
    with small_disk(tmp_path, "8m") as disk:
        assert build_main(["scenes", "--output", str(disk)]) == 2
        assert not list(disk.iterdir())
    assert re.fullmatch(r"error: --output: 8 MB are free in .*; a build needs 64 MB\n", capsys.readouterr().err)


def test_a_disk_that_is_full_when_the_preference_model_is_saved_is_told_as_that(tmp_path):
    with small_disk(tmp_path, "96m") as disk:

        def filled() -> tuple[np.ndarray, torch.Tensor]:
            fill(disk / "filler")
            return TINY.lesson()

        with pytest.raises(OSError, match="No space left on device"):
            build(dataclasses.replace(TINY, lesson=filled), disk)
        assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize(("enough", "steps"), [(0.0, 2), (0.29, 4)])
def test_a_build_ends_when_enough_of_its_pictures_are_right_and_else_after_all_steps(tmp_path, enough, steps):
    few = dataclasses.replace(TINY, prompts=lambda: ([], list(WORLD.finished[:2])))
    build_pipeline(dataclasses.replace(few, transformer_steps=4, looks=range(2, 4), enough=enough), tmp_path / "looked")
    build_pipeline(dataclasses.replace(few, transformer_steps=steps), tmp_path / "counted")
    assert _digest(tmp_path / "looked") == _digest(tmp_path / "counted")
