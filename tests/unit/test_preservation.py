"""What an edit leaves as it was: by pixels and by DINOv2's patches, against values by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from g2rpo_ray.data.pictures import picture_file
from g2rpo_ray.rewards import ask, build_reward, prompt_check
from tests.support.sources import WIDE, png

SOURCE = np.asarray(WIDE)  # [64, 96, 3]
HALF = SOURCE.copy()
HALF[:, 48:] = 255 - HALF[:, 48:]
MASK = np.zeros((32, 48, 3), np.uint8)  # of another size, white where the edit may change something
MASK[:, 24:] = 255
KNOWN = {"source": (SOURCE,)}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def test_pixels_that_change_count_unless_they_are_masked() -> None:
    reward = build_reward("preservation")
    images = np.stack([SOURCE, HALF, HALF])
    alike, changed, masked = reward.score(images, ["p"] * 3, [KNOWN, KNOWN, KNOWN | {"mask": MASK}])
    assert (alike, masked) == (1, pytest.approx(1, abs=0.02))  # the mask's edge is a pixel of its own size
    by_hand = 1 - np.abs(255.0 - 2 * SOURCE[:, 48:].astype(float)).mean() / 255 / 2
    assert changed == pytest.approx(by_hand, abs=1e-5)
    assert np.isnan(reward.score(images[:1], ["p"], [KNOWN | {"mask": np.full_like(MASK, 255)}])).all()
    larger = np.asarray(WIDE.resize((192, 128), Image.Resampling.BICUBIC))
    assert reward.score(images[:1], ["p"], [{"source": (larger,)}])[0] > 0.99


def test_patches_that_change_count_unless_they_are_masked(dino: str) -> None:
    reward = build_reward("preservation_dino", model=dino, size=56)
    images = np.stack([SOURCE, HALF, HALF])
    alike, changed, masked = reward.score(images, ["p"] * 3, [KNOWN, KNOWN, KNOWN | {"mask": MASK}])
    assert alike == pytest.approx(1, abs=1e-6)
    assert changed < masked < 1  # attention carries some of a change into patches that have none
    with pytest.raises(ValueError, match="^size: 50 given; must be a multiple of the patch of .*, 14"):
        build_reward("preservation_dino", model=dino, size=50)


def test_rewards_get_pictures_from_files_and_texts_without_sources(tmp_path: Path) -> None:
    file = picture_file(png(WIDE), tmp_path)
    given = {"source": (file,), "n": 1}
    told = []

    class Reward:
        def score(self, images, prompts, metadata):
            told.append((prompts, metadata))
            return [0.0] * len(images)

    prompt = f"make it red [source 96x64 {file.digest}]"
    ask(Reward(), np.stack([SOURCE] * 2), [prompt] * 2, [given] * 2)
    ((prompts, metadata),) = told
    assert prompts == ["make it red"] * 2
    assert metadata[0]["n"] == 1
    assert metadata[0]["source"][0].tobytes() == SOURCE.tobytes()
    assert ask(build_reward("preservation"), SOURCE[None], [prompt], [given]).tolist() == [1]
    check = prompt_check("preservation_dino")
    check(prompt, given)
    with pytest.raises(ValueError, match=r"^has no source image.*set model\.sources"):
        check("make it red", {})
