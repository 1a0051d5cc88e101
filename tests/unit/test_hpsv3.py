"""HPSv3: a small checkpoint under the published names, against transformers' whole Qwen2-VL and a head by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AddedToken, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from g2rpo_ray.rewards.hpsv3 import INSTRUCTION
from tests.support.hpsv3_files import (
    built,
    folder,  # noqa: F401  fixtures
    old_name,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)

PROMPTS = ["a cat", "two dogs {on} the moon"]


class Reference:
    """The released computation, one picture at a time, on transformers' Qwen2VLForConditionalGeneration."""

    def __init__(self, folder):
        config = Qwen2VLConfig.from_pretrained(folder / "base")
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "base")
        self.tokenizer.add_tokens([AddedToken("<|Reward|>", special=True, normalized=False)])
        config.text_config.vocab_size = len(self.tokenizer)
        self.network = Qwen2VLForConditionalGeneration(config).eval()
        self.weights = load_file(folder / "HPSv3.safetensors")
        names = {old_name(name): name for name in self.network.state_dict()}
        self.network.load_state_dict({names[old]: self.weights[old] for old in names})

    def outputs(self, image, prompt, positions="text"):
        patches, grid = self.patches(image)
        pads = "<|image_pad|>" * (grid[1] * grid[2] // 4)
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|>{pads}<|vision_end|>{INSTRUCTION.replace('{prompt}', prompt)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        after_another = torch.arange(ids.shape[1]).expand(3, 1, -1)
        kinds = (ids == self.network.config.image_token_id).long()
        with torch.no_grad():
            state = self.network.model(
                input_ids=ids, pixel_values=patches, image_grid_thw=torch.tensor([grid]), mm_token_type_ids=kinds,
                position_ids=after_another if positions == "text" else None,
            ).last_hidden_state  # fmt: skip
        (place,) = torch.nonzero(ids[0] == self.tokenizer.convert_tokens_to_ids("<|Reward|>"))[:, 0]
        features = state[0, place]
        for layer in (0, 3, 5):
            features = self.weights[f"rm_head.{layer}.weight"] @ features + self.weights[f"rm_head.{layer}.bias"]
            features = features.relu() if layer < 5 else features
        return [features[0].item(), math.exp(features[1].item())]

    @staticmethod
    def patches(image):
        """The picture at about 256 tokens of 28 × 28, as patches of 14 × 14 in groups of 2 × 2, each in two frames."""
        height, width = image.shape[:2]
        shrunk = math.sqrt(256 * 28 * 28 / (height * width))
        rows, columns = (math.ceil(side * shrunk / 28) for side in (height, width))  # fewer pixels than that before
        picture = Image.fromarray(image).resize((columns * 28, rows * 28), Image.Resampling.BICUBIC)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        values = (torch.from_numpy(np.array(picture)).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
        parts = values.reshape(rows, 2, 14, columns, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5)
        return parts.reshape(-1, 3, 1, 14, 14).expand(-1, 3, 2, 14, 14).reshape(-1, 3 * 2 * 14 * 14), (
            1,
            2 * rows,
            2 * columns,
        )


def test_both_outputs_are_those_of_the_whole_network_and_the_head(folder):
    reward, reference = built(folder), Reference(folder)
    expected = np.array([reference.outputs(*pair) for pair in zip(IMAGES, PROMPTS, strict=True)])
    outputs = reward.mean_and_spread(IMAGES, PROMPTS)  # of different lengths: one is padded
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, expected, rtol=2e-4, atol=2e-4)
    assert (outputs[:, 1] > 0).all()
    np.testing.assert_array_equal(
        reward.score(IMAGES[:1], PROMPTS[:1]), reward.mean_and_spread(IMAGES[:1], PROMPTS[:1])[:, 0]
    )
    np.testing.assert_allclose(reward.score(IMAGES[1:], PROMPTS[1:]), expected[1:, 0], rtol=2e-4, atol=2e-4)
    # what could be exchanged would be seen: prompts, pictures, outputs, and the positions of Qwen2-VL itself
    others = [reference.outputs(IMAGES[0], PROMPTS[1]), reference.outputs(IMAGES[1], PROMPTS[0])]
    others += [reference.outputs(IMAGES[0], PROMPTS[0], "of the grid"), expected[0, ::-1]]
    assert all(abs(other[0] - expected[0, 0]) > 2e-3 for other in others)
    half = built(folder, dtype="bfloat16").score(IMAGES, PROMPTS)
    np.testing.assert_allclose(half, expected[:, 0], atol=0.1)


def test_the_newer_names_of_weights_and_torchs_files_are_read_too(folder, tmp_path):
    weights = load_file(folder / "HPSv3.safetensors")
    newer = {}
    for name, value in weights.items():
        renamed = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        newer["model." + renamed if renamed.startswith("visual.") else renamed] = value
    assert newer.keys() != weights.keys()
    torch.save(newer, tmp_path / "newer.pth")
    scores = built(folder, tmp_path / "newer.pth").score(IMAGES[:1], PROMPTS[:1])
    np.testing.assert_array_equal(scores, built(folder).score(IMAGES[:1], PROMPTS[:1]))


def test_a_prompt_that_holds_the_token_of_the_score_does_not_move_the_head(folder):
    reward = built(folder)
    scores = reward.score(IMAGES[:1], ["a cat <|Reward|>"])
    assert np.isfinite(scores).all()
    assert reward.score(IMAGES[:1], ["a cat"]) != scores


def test_the_instruction_keeps_the_blanks_that_the_model_was_trained_with():
    assert "**Visual Quality:**  \nEvaluate" in INSTRUCTION
    assert "being the best. \n\n**" in INSTRUCTION
    assert INSTRUCTION.startswith("\nYou are tasked with evaluating a generated image")
    assert INSTRUCTION.endswith(
        "Textual prompt - {prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
    )


@pytest.mark.parametrize("broken", ["missing", "added", "shape", "head", "words"])
def test_checkpoint_that_does_not_fit_is_refused(folder, broken, tmp_path):
    weights = load_file(folder / "HPSv3.safetensors")
    if broken == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif broken == "added":
        weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    elif broken == "shape":
        weights["visual.blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    elif broken == "head":
        del weights["rm_head.5.bias"]
    else:
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1].clone()
    save_file(weights, tmp_path / "broken.safetensors")
    expected = (
        "^backbone: .* has 264 tokens" if broken == "words" else r"^checkpoint: .*broken\.safetensors does not fit"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        built(folder, tmp_path / "broken.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint": "none"}, "^checkpoint: no file"),
        ({"backbone": "/none"}, "^backbone: no directory"),
        (
            {"backbone": str(Path(__file__).parent)},
            "^backbone: Qwen2VLConfig cannot load|^backbone: AutoTokenizer cannot",
        ),
        ({"dtype": "int8"}, "^dtype: 'int8' given; allowed are"),
    ],
)
def test_wrong_option_is_named_in_one_line(folder, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        built(folder, **options)
    assert "\n" not in str(caught.value)


def test_wrong_pictures_are_refused_by_the_rewards_name(folder):
    with pytest.raises(ValueError, match="^reward hpsv3: 1 prompts for 2 images"):
        built(folder).score(IMAGES, ["a"])
