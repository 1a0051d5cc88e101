"""Small detectors in GenEval's real formats."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from g2rpo_ray.rewards import build_reward
from tests.support.tiny_clip import clip_sizes, letters_tokenizer, write_tiny_clip

CAT = {"class": "cat", "count": 1}


SWIN = {
    "image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip

NAMES = {0: "cat", 1: "mouse", 2: "dog"}

IMAGES = np.random.default_rng(5).integers(0, 256, (2, 48, 78, 3), dtype=np.uint8)

METADATA = {"tag": "two_object", "include": [CAT, {"class": "computer mouse", "count": 3}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random networks: a detector that knows three classes, two that take text, and the CLIP that names colours."""
    root = tmp_path_factory.mktemp("geneval")
    write_tiny_clip(root / "clip")
    for file in (root / "clip" / "processor").iterdir():
        (root / "clip" / "model" / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    shape = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_queries": 8, "encoder_layers": 1}
    sizes = {"decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16}
    labels = {"id2label": NAMES, "label2id": {name: at for at, name in NAMES.items()}}
    config = Mask2FormerConfig(backbone_config=SwinConfig(**SWIN), **shape, **sizes, **labels)
    network = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.normal_(network.class_predictor.weight, std=1.5)  # so that scores are far apart
    network.save_pretrained(root / "mask2former")
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(root / "mask2former")
    write_owl(root / "owl")
    write_grounding_dino(root / "dino")
    return root


def write_owl(path):
    tokenizer = letters_tokenizer(16)
    Owlv2ForObjectDetection(Owlv2Config(**clip_sizes(tokenizer), projection_dim=16)).save_pretrained(path)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(path)


def write_grounding_dino(path):
    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "dog"]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    text = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    part = {"layers": 2, "ffn_dim": 16, "attention_heads": 2}
    sizes = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in part.items()}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**SWIN), text_config=text, num_queries=6, d_model=32, max_text_len=16, **sizes
    )
    GroundingDinoForObjectDetection(config).save_pretrained(path)
    size: dict[str, int] = {"shortest_edge": 64, "longest_edge": 107}
    GroundingDinoProcessor(
        GroundingDinoImageProcessor(size=size), BertTokenizer(str(path / "vocab.txt"))
    ).save_pretrained(path)


def built(folder, detector="mask2former", **options):
    paths = {"model": str(folder / detector), "colour_model": str(folder / "clip" / "model")}
    return build_reward("geneval", **paths, **({"threshold": 0.2, "size": 64} | options))
