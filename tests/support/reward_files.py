"""Small checkpoints of the published reward models in their real formats."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tiny_clip import randomise, write_tiny_clip

CLIP_SHAPE = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}

VISION = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}

TEXT_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "dog", "on", "the", "moon", ",", "."]


def noise(count: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-dfn.json").write_text(json.dumps(CLIP_SHAPE))
    shape: dict[str, Any] = CLIP_SHAPE
    weights = randomise(open_clip.CLIP(**shape).state_dict())
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    save_file(weights, folder / "model.safetensors")
    return {"checkpoint": str(folder / "open_clip_pytorch_model.bin"), "architecture": str(folder / "tiny-dfn.json")}


@pytest.fixture(scope="session")
def transformers_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole CLIP and its processor, as transformers saves them and PickScore publishes them."""
    return write_tiny_clip(tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="session")
def aesthetic_files(transformers_files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(randomise(head_shapes(12), 0.1), path)
    return {"checkpoint": str(path), "backbone": transformers_files["model"]}


@pytest.fixture(scope="session")
def imagereward_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("imagereward")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    text = TEXT_SIZES | {"vocab_size": len(WORDS) + 2}
    (folder / "architecture.json").write_text(json.dumps({"vision": VISION, "text": text}))
    torch.save(randomise(imagereward_shapes(len(WORDS) + 2)), folder / "ImageReward.pt")
    names = {"checkpoint": "ImageReward.pt", "vocabulary": "vocab.txt", "architecture": "architecture.json"}
    return {option: str(folder / name) for option, name in names.items()}


@pytest.fixture
def files(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """Working options of a kind, by name."""
    fixtures = {"pickscore": "transformers_files"}
    return lambda kind: request.getfixturevalue(fixtures.get(kind, f"{kind}_files"))


def head_shapes(width: int) -> dict[str, Tensor]:
    """Keys and shapes of the authors' MLP: dropouts take up places 1, 3 and 5."""
    places = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {f"layers.{at}.weight": torch.zeros(shape) for at, shape in places.items()} | {
        f"layers.{at}.bias": torch.zeros(shape[0]) for at, shape in places.items()
    }


def imagereward_shapes(words: int) -> dict[str, Tensor]:
    """Keys and shapes of ImageReward.pt at a small size: BLIP's vision, text, two projections that are unused, head."""
    wide, size, inner = VISION["embed_dim"], TEXT_SIZES["hidden_size"], TEXT_SIZES["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, wide),
        "visual_encoder.pos_embed": (1, 5, wide),
        "visual_encoder.patch_embed.proj.weight": (wide, 3, 16, 16),
        "visual_encoder.patch_embed.proj.bias": (wide,),
        "text_encoder.embeddings.word_embeddings.weight": (words, size),
        "text_encoder.embeddings.position_embeddings.weight": (512, size),
        "text_encoder.embeddings.position_ids": (1, 512),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for layer in range(2):
        block, text = f"visual_encoder.blocks.{layer}", f"text_encoder.encoder.layer.{layer}"
        norm(f"{block}.norm1", wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.attn.qkv", 3 * wide, wide)
        linear(f"{block}.attn.proj", wide, wide)
        linear(f"{block}.mlp.fc1", 4 * wide, wide)
        linear(f"{block}.mlp.fc2", wide, 4 * wide)
        for attention, source in (("attention", size), ("crossattention", wide)):
            linear(f"{text}.{attention}.self.query", size, size)
            linear(f"{text}.{attention}.self.key", size, source)
            linear(f"{text}.{attention}.self.value", size, source)
            linear(f"{text}.{attention}.output.dense", size, size)
            norm(f"{text}.{attention}.output.LayerNorm", size)
        linear(f"{text}.intermediate.dense", inner, size)
        linear(f"{text}.output.dense", size, inner)
        norm(f"{text}.output.LayerNorm", size)
    norm("visual_encoder.norm", wide)
    norm("text_encoder.embeddings.LayerNorm", size)
    linear("vision_proj", 256, wide)
    linear("text_proj", 256, size)
    blip = {f"blip.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    return blip | {f"mlp.{key}": value for key, value in head_shapes(size).items()}


LOADED = ["clip", "pickscore", "imagereward", "aesthetic"]
