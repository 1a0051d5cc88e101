"""The world `video_quickstart`: rules are right of what is drawn, and the committed model is as its README says."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from g2rpo_ray.config import load_config
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.rewards import build_reward
from g2rpo_ray.world_builder.video import measure_videos
from g2rpo_ray.world_builder.video_quickstart import WORLD
from g2rpo_ray.worlds.video_quickstart.draw import SCENES, Scene, draw, parse
from g2rpo_ray.worlds.video_quickstart.rules import check_prompt, seen_direction

SCENE = Scene("red", "cross", "left")
BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}


def scores(video: np.ndarray, prompt: object) -> tuple[float, float]:
    """Of direction, and of colour and shape over the frames."""
    frames = build_reward("motion_thing").score(video, [str(prompt)] * len(video))
    return float(build_reward("motion_direction").score(video[None], [str(prompt)])[0]), float(np.mean(frames))


def test_rules_are_right_of_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    for scene in [SCENES[at] for at in rng.permutation(len(SCENES))[:48]]:
        video = draw(scene, rng)
        assert scores(video, scene) == (1, 1)
        assert scores(video[::-1], scene) == (0, 1)
        assert scores(video[::-1], scene._replace(direction=BACK[scene.direction])) == (1, 1)
        other = SCENES[rng.integers(len(SCENES))]
        same = (other.direction == scene.direction, (other.colour, other.shape) == (scene.colour, scene.shape))
        assert scores(video, other) == same


def test_a_shape_that_rests_jumps_slides_or_vanishes_has_no_direction() -> None:
    video = draw(SCENE, np.random.default_rng(0))
    assert seen_direction(video) == "left"
    assert seen_direction(video[:1].repeat(5, 0)) is None
    assert seen_direction(video[[0, 1, 3, 2, 4]]) is None  # back once
    assert seen_direction(np.stack([np.roll(frame, 2 * at, 0) for at, frame in enumerate(video)])) is None  # aside
    assert seen_direction(np.stack([np.roll(frame, 2 * at, 1) for at, frame in enumerate(video)])) is None  # too slow
    gone = video.copy()
    gone[2] = 48
    assert seen_direction(gone) is None
    assert scores(gone, SCENE) == (0, pytest.approx(0.8))


def test_what_is_no_video_of_this_world_is_refused_and_a_strange_prompt_has_no_score() -> None:
    video = draw(SCENE, np.random.default_rng(0))
    assert all(parse(str(scene)) == scene for scene in SCENES)
    assert parse("A red cross  moves LEFT") == SCENE
    assert np.isnan(scores(video, "a red star")).all()
    with pytest.raises(ValueError, match="is not a prompt of video_quickstart, such as 'a red circle moves left'"):
        check_prompt("a red star", {})
    for shape in ((2, 1, 32, 32, 3), (2, 32, 32, 3), (2, 5, 64, 64, 3)):
        with pytest.raises(ValueError, match=r"motion_direction takes \[N, 2 or more, 32, 32, 3\]"):
            build_reward("motion_direction").score(np.zeros(shape, np.uint8), [str(SCENE)] * 2)
    with pytest.raises(ValueError, match=r"motion_thing takes \[N, 32, 32, 3\]"):
        build_reward("motion_thing").score(np.zeros((2, 64, 64, 3), np.uint8), [str(SCENE)] * 2)


def test_the_prompts_are_those_of_the_builder_and_no_held_out_pair_is_trained_on() -> None:
    prompts = read_run_prompts(load_config("video_quickstart"))
    assert (list(prompts.train), list(prompts.heldout)) == WORLD.prompts()
    assert (len(prompts.train), len(prompts.heldout)) == (96, 32)
    train, heldout = ({parse(name)[:2] for name in names} for names in WORLD.prompts())
    assert not train & heldout
    for part in (train, heldout):
        assert {len({pair[at] for pair in part}) for at in (0, 1)} == {8, 4}


def test_the_committed_model_shows_the_thing_and_moves_half_of_the_videos_right() -> None:
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(str(WORLD.root / "pipeline"), torch_dtype=torch.float32)
    found = measure_videos(WORLD, pipeline, seeds=2)
    assert 0.4 < found["direction"] < 0.7
    assert found["thing"] > 0.7
    size = sum(file.stat().st_size for file in WORLD.root.rglob("*") if file.is_file())
    assert size < 5e6
