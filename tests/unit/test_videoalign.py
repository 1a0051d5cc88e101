"""VideoAlign: a small checkpoint under the published names, against PEFT on transformers' whole Qwen2-VL and a head."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import Qwen2Tokenizer, Qwen2VLConfig

from g2rpo_ray.config import load_config
from g2rpo_ray.rewards import serving
from g2rpo_ray.rewards.videoalign import INSTRUCTION, frames_read
from tests.support.videoalign_files import (
    TOKENS,
    adapted,
    built,
    folder,  # noqa: F401  fixtures
    released_name,
)

VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 5, 40, 60, 3), dtype=np.uint8)
PROMPTS = ["a cat runs", "two dogs {on} the moon"]
PARTS = ("visual_quality", "motion_quality", "text_alignment")
MEANS, DEVIATIONS = np.array([3.6757, 1.1646, 2.8105]), np.array([2.2476, 1.3811, 2.5121])


class Reference:
    """The released computation, one video at a time: the LoRA is not merged."""

    def __init__(self, folder):
        config = Qwen2VLConfig.from_pretrained(folder / "base")
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "base")
        self.network = adapted(config, self.tokenizer)
        weights = torch.load(folder / "model.pth", weights_only=True)
        names = {released_name(name): name for name in self.network.state_dict()}
        self.network.load_state_dict({names[name]: value for name, value in weights.items()})
        self.inner = self.network.base_model.model

    def grades(self, video, prompt):
        patches, grid = self.patches(video)
        pads = "<|video_pad|>" * (math.prod(grid) // 4)
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|>{pads}<|vision_end|>{INSTRUCTION.replace('{prompt}', prompt)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            state = self.inner.model(
                input_ids=ids, pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]),
                mm_token_type_ids=2 * (ids == self.inner.config.video_token_id).long(),
                position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            ).last_hidden_state  # fmt: skip
            grades = self.inner.rm_head(state)[0, :, 0]
        return [grades[ids[0] == self.tokenizer.convert_tokens_to_ids(token)].item() for token in TOKENS]

    @staticmethod
    def patches(video):
        """Frames 0, 1, 3, 4 of five, of 128 tokens of 28 × 28 or more, as patches of 14 × 14 of two frames."""
        frames = torch.from_numpy(video[[0, 1, 3, 4]]).permute(0, 3, 1, 2)
        height, width = frames.shape[2:]
        larger = math.sqrt(128 * 28 * 28 / (height * width))
        rows, columns = (math.ceil(side * larger / 28) for side in (height, width))
        sized = resize(frames, [28 * rows, 28 * columns], InterpolationMode.BICUBIC, antialias=True).float()
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        values = (sized / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        parts = values.reshape(2, 2, 3, rows, 2, 14, columns, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return parts.reshape(-1, 3 * 2 * 14 * 14), (2, 2 * rows, 2 * columns)


@pytest.fixture(scope="module")
def expected(folder):
    reference = Reference(folder)
    grades = np.array([reference.grades(*pair) for pair in zip(VIDEOS, PROMPTS, strict=True)])
    return (grades - MEANS) / DEVIATIONS


def test_the_parts_are_those_of_the_adapted_network_and_the_head(folder, expected):
    found = built(folder).score_parts(VIDEOS, PROMPTS)  # of different lengths: one is padded
    assert tuple(found) == PARTS
    scores = np.stack([found[part] for part in PARTS], axis=1)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=2e-4, atol=2e-4)
    for part, column in zip(PARTS, expected.T, strict=True):
        np.testing.assert_allclose(built(folder, part=part).score(VIDEOS[1:], PROMPTS[1:]), column[1:], atol=2e-4)
    # what could be exchanged would be seen: the parts, the videos, the prompts of the last part
    assert min(abs(np.diff(expected, axis=1)).min(), abs(expected[0] - expected[1]).min()) > 2e-3
    half = built(folder, dtype="bfloat16").score(VIDEOS, PROMPTS)
    np.testing.assert_allclose(half, expected[:, 0], atol=0.1)


def test_the_lora_counts_and_merged_weights_under_newer_names_do_too(folder, tmp_path, expected):
    weights = torch.load(folder / "model.pth", weights_only=True)
    without = {name: value * (".lora_B" not in name) for name, value in weights.items()}
    torch.save(without, tmp_path / "without.pth")
    assert (abs(built(folder, tmp_path / "without.pth").score(VIDEOS, PROMPTS) - expected[:, 0]) > 1e-2).all()
    merged = Reference(folder).network.merge_and_unload().state_dict()
    torch.save(merged, tmp_path / "merged.pth")
    np.testing.assert_allclose(
        built(folder, tmp_path / "merged.pth").score(VIDEOS, PROMPTS), expected[:, 0], rtol=2e-4, atol=2e-4
    )


def test_a_prompt_that_holds_the_tokens_of_the_parts_moves_no_head(folder):
    reward = built(folder)
    plain, strange = (reward.score_parts(VIDEOS[:1], [prompt]) for prompt in ("a cat", f"a cat {''.join(TOKENS)}"))
    np.testing.assert_allclose(strange["visual_quality"], plain["visual_quality"], rtol=1e-5)  # read before the prompt
    np.testing.assert_allclose(strange["motion_quality"], plain["motion_quality"], rtol=1e-5)
    assert np.isfinite(strange["text_alignment"]).all()


def test_the_frames_read_are_two_a_second_an_even_number_and_four_or_more():
    assert frames_read(81, 16.0).tolist() == torch.linspace(0, 80, 10).round().long().tolist()
    assert frames_read(121, 24.0).tolist() == torch.linspace(0, 120, 10).round().long().tolist()
    assert frames_read(5, 16.0).tolist() == [0, 1, 3, 4]
    assert frames_read(3, 16.0).tolist() == [0, 2]
    assert frames_read(2, 16.0).tolist() == [0, 1]


def test_the_instruction_keeps_the_blanks_that_the_model_was_trained_with():
    assert INSTRUCTION.startswith("\nYou are tasked with evaluating a generated video based on three distinct criteria")
    assert INSTRUCTION.endswith("Text Alignment: <|TA_reward|>\nEND\n")
    assert "**Visual Quality:**  \nEvaluate" in INSTRUCTION
    assert "lowest possible. \n\nPlease provide" in INSTRUCTION
    assert "is acceptable.  \n- **Style" in INSTRUCTION
    assert [INSTRUCTION.count(token) for token in TOKENS] == [1, 1, 1]


def test_parts_share_servers_and_what_cannot_be_used_is_said_in_a_line(folder):
    sections = [f"rewards.{part}={{kind: videoalign, options: {{part: {part}}}}}" for part in PARTS]
    rewards = load_config(None, ["rewards.preference=null", *sections]).rewards
    assert set(serving(rewards).values()) == {PARTS[0]}
    with pytest.raises(ValueError, match="part: 'TA' given; allowed are visual_quality, motion_quality, text_ali"):
        built(folder, part="TA")
    with pytest.raises(ValueError, match="fps: 0 given; allowed are numbers above 0, to 1000"):
        built(folder, fps=0)
    reward = built(folder)
    with pytest.raises(ValueError, match=r"^reward videoalign: images are uint8 \[2, 40, 60, 3\]; expected .*F, H"):
        reward.score(VIDEOS[:, 0], PROMPTS)
    with pytest.raises(ValueError, match="^reward videoalign: 1 frames given; it needs 2 or more"):
        reward.score(VIDEOS[:, :1], PROMPTS)


def test_a_checkpoint_that_does_not_fit_is_named(folder, tmp_path):
    weights = torch.load(folder / "model.pth", weights_only=True)
    torch.save({name: value for name, value in weights.items() if "rm_head" not in name}, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"^checkpoint: .*headless\.pth does not fit a head on the 32 features"):
        built(folder, tmp_path / "headless.pth")
    half = {name: value for name, value in weights.items() if not name.endswith("q_proj.lora_B.default.weight")}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"^checkpoint: .*half\.pth has weights without their LoRA, .*q_proj\.lora_B"):
        built(folder, tmp_path / "half.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^checkpoint: .*other\.pth has no embedding of tokens"):
        built(folder, tmp_path / "other.pth")
    short = {name: value[:-1] if "embed_tokens" in name else value for name, value in weights.items()}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"^backbone: .* tokens with <\|VQ_reward\|>, .*; give its base model, Qwen"):
        built(folder, tmp_path / "short.pth")
