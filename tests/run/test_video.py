"""Videos: Wan's pipelines against their own call, frames through rewards, pictures and the panel."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from g2rpo_ray import load_config
from g2rpo_ray.analysis.video import MAX_SHOWN, strip, unstrip
from g2rpo_ray.methods import method_names
from g2rpo_ray.models import FlowModel
from g2rpo_ray.models.estimate import rollout_memory
from g2rpo_ray.preflight import check_network
from g2rpo_ray.report.gallery import data_uri
from g2rpo_ray.rewards import ask_in_chunks, build_reward
from g2rpo_ray.rollout.cost import object_store_bytes
from g2rpo_ray.rollout.plan import prompt_tree, rollout_evaluations
from g2rpo_ray.runs.hacking import image_traces
from tests.support.method_runs import SMALL as SMALL_TREES
from tests.support.pipelines import PROMPTS, SCALE, load, run_settings, settings, tiny
from tests.support.runs import dotted

SMALL = {"height": 16, "width": 32}
SIZES = {"wan": SMALL, "wan_5b": {"height": 32, "width": 64}, "wan_a14b": SMALL}
VIDEOS = pytest.mark.parametrize(("family", "frames"), [("wan", 9), ("wan_5b", 5), ("wan_a14b", 5)])
SECOND_SCALE = {"wan_a14b": {"guidance_scale_2": 4.0}}  # of the network for low noise


def model_of(family: str, frames: int) -> FlowModel:
    return load(family, frames=frames, **SIZES[family], **SECOND_SCALE.get(family, {}))


def noise(model: FlowModel) -> torch.Tensor:
    return torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(3)])


@VIDEOS
@torch.no_grad()
def test_videos_are_those_of_the_pipeline(family: str, frames: int) -> None:
    model, steps = model_of(family, frames), 3
    conditioning = model.condition(model.encode(PROMPTS), model.encode(["bad"], negative=True)[0])
    x = noise(model)
    for now, then in itertools.pairwise(model.sigmas(steps)):
        x = x + (then - now) * model.velocity(x, now.expand(len(x)), conditioning)
    found = model.decode(x)
    made = model.pipeline_class.from_pretrained(tiny(family))
    made.set_progress_bar_config(disable=True)
    expected = made(
        prompt=PROMPTS, negative_prompt=["bad"] * 3, num_frames=frames, num_inference_steps=steps,
        guidance_scale=SCALE, generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
        max_sequence_length=model.text_tokens, output_type="np", **SIZES[family], **SECOND_SCALE.get(family, {}),
    ).frames  # fmt: skip
    assert found.shape == expected.shape == (3, frames, *SIZES[family].values(), 3)
    assert expected.std() > 0.05
    assert np.abs(expected[:, 1:] - expected[:, :-1]).mean() > 0.01  # frames differ
    assert np.abs(found.numpy() / 255 - expected).max() * 255 <= 1


@VIDEOS
@torch.no_grad()
def test_a_mixed_batch_of_videos_is_each_alone(family: str, frames: int) -> None:
    model = model_of(family, frames)
    prompts, x, sigma = model.encode(PROMPTS), noise(model), torch.tensor([1.0, 0.73, 0.1])
    together = model.velocity(x, sigma, model.condition(prompts))
    for at, prompt in enumerate(prompts):
        alone = model.velocity(x[at : at + 1], sigma[at : at + 1], model.condition([prompt]))
        torch.testing.assert_close(together[at : at + 1], alone, rtol=1e-5, atol=2e-5 * float(alone.abs().max()))


@pytest.mark.parametrize(
    ("family", "frames", "words"),
    [
        ("wan", 6, "model.frames: 6 given; a WanPipeline makes 1 + 4n frames, e.g. 5 or 9"),
        ("sd3", 5, "model.frames: 5 given; a StableDiffusion3Pipeline makes images; remove it"),
    ],
)
def test_frames_that_a_pipeline_does_not_make_are_refused(family: str, frames: int, words: str) -> None:
    with pytest.raises(ValueError, match="model.frames") as error:
        FlowModel.load(settings(family, frames=frames), "cpu")
    assert str(error.value) == words


FEW = {  # what makes a method's tree small
    "dance_grpo": {"branch_steps": "[0]"},
    "flow_grpo_fast": {"roots": 2, "group_size": 2},
    "tempflow_grpo": {"group_size": 2},
} | SMALL_TREES


@pytest.mark.parametrize("method", method_names())
def test_every_method_trains_on_frames(method: str, alone: Any, tmp_path: Path) -> None:
    given = run_settings("wan", tmp_path) | {f"sampler__{key}": value for key, value in FEW.get(method, {}).items()}
    given |= {"method": method, "model__frames": 5, "model__height": 16, "model__width": 16, "iterations": 1}
    given |= {"learner__updates_per_rollout": 1}
    config = load_config(None, [f"{key}={value}" for key, value in dotted(given).items()])
    (line,) = alone(**given).result().lines
    trees = [prompt_tree(config, 0, slot, "a red cat") for slot in range(2)]
    planned = [rollout_evaluations(config, tree, 0, slot) for slot, tree in enumerate(trees)]
    assert line["rollout/evaluations"] == sum(planned)
    assert line.get("learner/ratio_initial_max_dev", 0.0) == 0
    assert line["mismatch/velocity"] < 1e-5
    assert line["learner/grad_norm"] > 0


def test_the_learner_of_two_networks_trains_the_first_one_on_policy(alone: Any, tmp_path: Path) -> None:
    """Completions cross from one to the other; the learner, which never does, loads one of them."""
    given = run_settings("wan_a14b", tmp_path) | {"model__guidance_scale_2": 4.0, "sampler__branch_steps": [0, 1]}
    for line in alone(**given).result().lines:
        assert line["mismatch/velocity"] < 1e-5
        assert line["learner/ratio_initial_max_dev"] == 0 < line["learner/ratio_max_dev"]
        assert line["watch/trained_modules"] == 1
    one, both = (
        FlowModel.load(settings("wan_a14b"), "cpu", transformer=True, low_noise=second) for second in (False, True)
    )
    assert one.low_noise is None
    assert not any(parameter.requires_grad for parameter in both.low_noise.parameters())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["sampler.branch_steps=[3, 4, 5]"], "sampler.branch_steps: edges that start at [5] would be trained"),
        (["sampler.branch_steps=[3, 4, 5]", "sampler.untrained=[5]"], None),
        (["sampler.branch_steps=[3, 4, 5]", "sampler.shift=12"], None),
        (["sampler.branch_steps=auto"], None),
        (["method=mix_grpo"], "sampler.branch_steps: edges that start at [5, 6, "),
        (["method=diffusion_nft"], "learner.objective=nft given"),
        (["method=pave_grpo"], "learner.subpaths given"),
    ],
)
def test_a_plan_that_would_train_below_the_boundary_is_refused(given: list[str], words: str | None) -> None:
    own = {"path": tiny("wan_a14b"), "max_sequence_length": 64, **SMALL}
    config = load_config(None, [f"model.{key}={value}" for key, value in own.items()] + ["sampler.shift=5", *given])
    if words is None:
        check_network(config)
        return
    with pytest.raises(ValueError, match=r"^[^\n]*second network[^\n]*$") as error:
        check_network(config)
    assert str(error.value).startswith(words)


def test_a_second_scale_for_one_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.guidance_scale_2: 3 given, but this WanPipeline has one network"):
        FlowModel.load(settings("wan", guidance_scale_2=3.0), "cpu")


def test_memory_counts_both_networks() -> None:
    one, two = (
        rollout_memory(load_config().model_copy(update={"model": settings(family, **SMALL)}))
        for family in ("wan", "wan_a14b")
    )
    network = sum(p.numel() * p.element_size() for p in FlowModel.skeleton(settings("wan")).transformer.parameters())
    assert two["weights"] - one["weights"] == network
    assert one["velocity"] < two["velocity"] < 1.3 * one["velocity"]  # rows of each network are copied


def test_memory_and_the_object_store_count_all_frames() -> None:
    one, nine = (
        load_config().model_copy(update={"model": settings("wan", frames=frames, **SIZES["wan"])}) for frames in (1, 9)
    )
    assert rollout_memory(nine)["decode"] > 3 * rollout_memory(one)["decode"]
    assert rollout_memory(nine)["velocity"] > rollout_memory(one)["velocity"]
    assert object_store_bytes(nine) > object_store_bytes(one)


class Brightness:
    """Of each picture; missing for the brightest."""

    def score(self, images, prompts):
        means = images.mean((1, 2, 3))
        return [None if mean > 200 else mean for mean in means]


class Groups(Brightness):
    scope = "group"

    def score(self, images, prompts):
        return images.mean((1, 2, 3)) - images.mean()


class Videos:
    scope = "video"

    def score(self, images, prompts):
        assert images.ndim == 5
        return images.shape[1] * np.ones(len(images))


LEVELS = np.array([[10, 20, 60], [0, 100, 250]], np.uint8)
CLIPS = np.broadcast_to(LEVELS[:, :, None, None, None], (2, 3, 4, 4, 3))


@pytest.mark.parametrize(
    ("reward", "frames", "expected"),
    [
        (Brightness(), "all", [30, np.nan]),
        (Brightness(), "first", [10, 0]),
        (Brightness(), "last", [60, np.nan]),
        (Brightness(), (0, -2), [15, 50]),
        (Groups(), "all", [(5 - 40 - 95) / 3, (-5 + 40 + 95) / 3]),
        (Videos(), "all", [3, 3]),
        (Videos(), (0, -1), [2, 2]),
    ],
)
def test_a_reward_scores_the_frames_of_its_section(reward: Any, frames: Any, expected: list[float]) -> None:
    found = ask_in_chunks(reward, CLIPS, "x", {}, 2, frames)[""]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_reward_of_videos_takes_a_picture_for_one_frame() -> None:
    assert ask_in_chunks(Videos(), CLIPS[:, 0], "x", {}, 2)[""].tolist() == [1, 1]


@pytest.mark.parametrize("given", ["[5]", "[-6]", "[]"])
def test_frames_beyond_the_video_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"^rewards\.preference\.frames: \[[^\n]*indices from -5 to 4") as error:
        load_config(None, ["model.frames=5", f"rewards.preference.frames={given}"])
    assert "\n" not in str(error.value)


def test_a_strip_holds_evenly_spaced_frames() -> None:
    video = np.arange(17, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    shown = strip(video)
    assert shown.shape == (2, 3 * MAX_SHOWN, 3)
    assert [part[0, 0, 0] for part in unstrip(shown, len(video))] == list(range(0, 17, 2))
    assert strip(video[0]).shape == (2, 3, 3)


def test_a_report_shows_a_video_that_moves() -> None:
    import base64

    video = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    uri = data_uri(strip(video), 5)
    assert uri.startswith("data:image/webp;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).n_frames == 5


def test_the_panel_s_numbers_of_videos_are_means_over_frames() -> None:
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    of_frames = [image_traces(videos[:, frame]) for frame in range(3)]
    for name, value in image_traces(videos).items():
        assert value == pytest.approx(np.mean([traces[name] for traces in of_frames]))


def moving(pixels: int) -> np.ndarray:
    """Five frames of a smooth texture that moves to the right by so many pixels each."""
    rng = np.random.default_rng(0)
    texture = np.array(
        Image.fromarray(rng.integers(0, 256, (16, 24), np.uint8)).resize((192, 128), Image.Resampling.BICUBIC)
    )
    frames = [texture[:, 60 - pixels * frame : 188 - pixels * frame] for frame in range(5)]
    return np.repeat(np.stack(frames)[..., None], 3, -1)


def test_motion_is_measured_in_pixels_and_undone() -> None:
    flicker = moving(0).copy()
    flicker[1::2] //= 2
    clips = np.stack([moving(0), moving(1), moving(3), flicker])
    degree = build_reward("dynamic_degree").score(clips, [""] * 4)
    assert degree[0] < 0.2
    assert degree[1] == pytest.approx(2, rel=0.5)  # 128 pixels count as 256
    assert degree[2] == pytest.approx(6, rel=0.5)
    consistent = build_reward("temporal_consistency").score(clips, [""] * 4)
    assert consistent[0] == pytest.approx(1, abs=1e-3)
    assert consistent[1] > 0.97 > 0.9 > consistent[3]
    still = 1 - np.abs(np.diff(moving(3).astype(float), axis=0)).mean() / 255
    assert consistent[2] > still + 0.05
    with pytest.raises(ValueError, match=r"model\.frames is 1; motion needs 2"):
        build_reward("dynamic_degree").score(clips[:, 0], [""] * 4)
