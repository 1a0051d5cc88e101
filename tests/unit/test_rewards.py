"""Reward models against the packages they stand for, and against pictures whose answer is known."""

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from g2rpo_ray.config import RewardConfig
from g2rpo_ray.rewards import Reward, build_reward, open_reward
from g2rpo_ray.rewards.hpsv2 import load_architecture, new_network, preprocess
from g2rpo_ray.worlds.quickstart import PREFERENCE_ARCHITECTURE, PREFERENCE_CHECKPOINT
from g2rpo_ray.worlds.quickstart.shapes import BACKGROUND, COLOURS, SHAPES, caption, paint, render

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def preference() -> Reward:
    return build_reward("hpsv2", checkpoint=str(PREFERENCE_CHECKPOINT), architecture=str(PREFERENCE_ARCHITECTURE))


@pytest.fixture
def tiny_model(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoint and architecture of a random network, the checkpoint as HPSv2 publishes it: half precision, keyed."""
    checkpoint, architecture = tmp_path / "tiny.pt", tmp_path / "tiny.json"
    architecture.write_text(json.dumps(ARCHITECTURE))
    torch.manual_seed(0)
    weights = {name: tensor.half() for name, tensor in new_network(ARCHITECTURE).state_dict().items()}
    torch.save({"state_dict": weights}, checkpoint)
    return checkpoint, architecture


def _true_pictures(count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """`count` renderings of every colour and shape, and their captions."""
    rng = np.random.default_rng(7)
    pairs = list(product(COLOURS, SHAPES)) * count
    return np.stack([render(*pair, rng) for pair in pairs]), [caption(*pair) for pair in pairs]


def _noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def test_preference_is_near_one_for_the_truth_and_lower_for_every_other_caption(preference: Reward) -> None:
    images, prompts = _true_pictures(2)
    truth = preference.score(images, prompts)
    wrong_shape = [caption(prompt.split()[1], SHAPES[(SHAPES.index(prompt.split()[2]) + 1) % 6]) for prompt in prompts]
    colours = list(COLOURS)
    wrong_colour = [
        caption(colours[(colours.index(prompt.split()[1]) + 3) % 8], prompt.split()[2]) for prompt in prompts
    ]
    assert truth.mean() > 0.97
    assert (truth > preference.score(images, wrong_shape)).mean() > 0.98
    assert (truth > preference.score(images, wrong_colour)).mean() > 0.98


def test_preference_falls_as_noise_grows(preference: Reward) -> None:
    images, prompts = _true_pictures(1)
    noise = np.random.default_rng(0).normal(size=images.shape)
    spoilt = [np.clip(images + level * noise, 0, 255).astype(np.uint8) for level in (0, 30, 60, 120)]
    means = [preference.score(each, prompts).mean() for each in spoilt]
    assert means == sorted(means, reverse=True)


def test_score_of_a_batch_is_the_score_of_each_picture(preference: Reward) -> None:
    images, prompts = _true_pictures(1)
    together = preference.score(images, prompts)
    apart = [preference.score(images[k : k + 1], prompts[k : k + 1])[0] for k in range(len(prompts))]
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_score_is_the_cosine_of_hpsv2s_own_features(tiny_model: tuple[Path, Path]) -> None:
    checkpoint, architecture = tiny_model
    reward = build_reward("hpsv2", checkpoint=str(checkpoint), architecture=str(architecture))
    network = new_network(ARCHITECTURE).eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    images, prompts = _noise(3, 16, 16, 3), ["a cat", "two dogs, one hat", "a cat"]
    tokens = torch.zeros(3, 77, dtype=torch.long)
    tokens[0, :4] = tokens[2, :4] = torch.tensor([49406, 320, 2368, 49407])
    tokens[1, :7] = torch.tensor([49406, 1237, 3255, 267, 637, 3801, 49407])
    with torch.no_grad():
        image_features, text_features, _ = network(preprocess(images, 16), tokens)
    expected = (image_features @ text_features.T).diagonal().numpy()
    np.testing.assert_allclose(reward.score(images, prompts), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 80), (90, 31), (20, 12)])
def test_preprocessing_is_hpsv2s_own(height: int, width: int) -> None:
    load_architecture("ViT-H-14")  # makes the package importable
    from hpsv2.src.open_clip import image_transform

    image = _noise(height, width, 3)
    reference = image_transform(32, is_train=False, resize_longest_max=True)(Image.fromarray(image))
    torch.testing.assert_close(preprocess(image[None], 32)[0], reference, atol=1e-6, rtol=0)


def test_wide_picture_of_the_right_length_is_padded_too() -> None:
    # hpsv2's own transform forgets this case and its network then refuses the picture.
    pixels = preprocess(np.full((1, 8, 16, 3), 255, dtype=np.uint8), 16)
    assert pixels.shape == (1, 3, 16, 16)
    assert torch.equal(pixels[0, 0, :4], pixels[0, 0, 12:])
    assert pixels[0, 0, 4:12].min() > pixels[0, 0, :4].max()


def test_default_architecture_is_hpsv2_1s() -> None:
    shape = load_architecture("ViT-H-14")
    assert shape["embed_dim"] == 1024
    assert shape["vision_cfg"]["image_size"] == 224
    assert shape["text_cfg"]["layers"] == 24


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"checkpoint": "/nowhere/model.pt"}, "no file '/nowhere/model.pt'"),
        ({"architecture": "ViT-Z"}, "'ViT-Z' is neither a file nor an open_clip model"),
        ({"device": "tpu:0"}, "device: 'tpu:0' cannot be used"),
        ({"architecture": __file__}, r"test_rewards.py as JSON"),
        ({"dtype": "int8"}, "'int8' given; allowed are float32, bfloat16, float16"),
        ({"weights": "x"}, "unexpected keyword argument 'weights'; its options: checkpoint, architecture"),
    ],
)
def test_wrong_option_is_named_in_one_line(
    options: dict[str, str], expected: str, tiny_model: tuple[Path, Path]
) -> None:
    checkpoint, architecture = tiny_model
    with pytest.raises(ValueError, match=expected) as caught:
        build_reward("hpsv2", **({"checkpoint": str(checkpoint), "architecture": str(architecture)} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", ["key_missing", "key_added", "shape", "no_state_dict", "not_a_checkpoint"])
def test_checkpoint_that_does_not_fit_is_refused(broken: str, tiny_model: tuple[Path, Path]) -> None:
    checkpoint, architecture = tiny_model
    content = torch.load(checkpoint, weights_only=True)
    if broken == "key_missing":
        del content["state_dict"]["visual.proj"]
    elif broken == "key_added":
        content["state_dict"]["visual.extra"] = torch.zeros(1)
    elif broken == "shape":
        content["state_dict"]["visual.proj"] = torch.zeros(3, 3)
    elif broken == "no_state_dict":
        content = content["state_dict"]
    torch.save(content, checkpoint)
    if broken == "not_a_checkpoint":
        checkpoint.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"^checkpoint: .*tiny\.pt") as caught:
        build_reward("hpsv2", checkpoint=str(checkpoint), architecture=str(architecture))
    assert "\n" not in str(caught.value)


def test_rules_see_every_colour_and_shape() -> None:
    images, prompts = _true_pictures(10)
    assert build_reward("colour_accuracy").score(images, prompts).mean() > 0.98
    assert build_reward("shape_accuracy").score(images, prompts).mean() > 0.98


def test_rules_say_no_to_the_wrong_picture() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([render("red", "circle", rng), paint(np.zeros((32, 32), np.float32), BACKGROUND)])
    noise = _noise(1, 32, 32, 3)
    for kind in ("colour_accuracy", "shape_accuracy"):
        reward = build_reward(kind)
        assert reward.score(images, ["a blue ring", "a red circle"]).tolist() == [0, 0]
    assert build_reward("shape_accuracy").score(noise, ["a red square"]).tolist() == [0]


def test_prompt_that_names_no_shape_has_no_score() -> None:
    images, prompts = _true_pictures(1)
    scores = build_reward("shape_accuracy").score(images[:2], ["a view of the sea", prompts[1]])
    assert np.isnan(scores[0])
    assert scores[1] == 1


def test_rules_refuse_another_picture_size() -> None:
    with pytest.raises(ValueError, match=r"take \[N, 32, 32, 3\]"):
        build_reward("shape_accuracy").score(_noise(1, 64, 64, 3), ["a red circle"])


class _Brightness:
    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        return images.mean(axis=(1, 2, 3), dtype=np.float32)


def test_factory_of_ones_own_by_import_path() -> None:
    reward = build_reward(f"{__name__}:_Brightness")
    assert reward.score(np.full((2, 4, 4, 3), 7, dtype=np.uint8), ["", ""]).tolist() == [7, 7]


class _Placed(_Brightness):
    def __init__(self, device: str = "cpu"):
        self.device = device


def test_a_server_computes_on_the_gpu_that_it_reserves() -> None:
    for resources, device in (({"GPU": 0.5}, "cuda"), ({"CPU": 1}, "cpu")):
        placed: Any = open_reward(RewardConfig(kind=f"{__name__}:_Placed", resources=resources))
        assert placed.device == device
    assert isinstance(open_reward(RewardConfig(kind=f"{__name__}:_Brightness")), _Brightness)  # takes no device


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hps", "'hps' given; allowed are .*hpsv2"),
        ("no_such_module:build", "No module named 'no_such_module'"),
        ("json:no_such_factory", "no attribute 'no_such_factory'"),
    ],
)
def test_wrong_kind_is_named(kind: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build_reward(kind)


def test_importing_rewards_loads_no_model_code() -> None:
    program = (
        "import sys, g2rpo_ray.rewards; "
        "print([m for m in ('torch', 'open_clip', 'hpsv2', 'ray', 'g2rpo_ray.config') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
