"""A small Qwen2-VL, and an HPSv3 checkpoint in its real format."""

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from g2rpo_ray.rewards import build_reward

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

WIDTH = 32


def save_base(path):
    """Configuration and tokenizer of a small Qwen2-VL, which are saved there."""
    letters = {letter: at for at, letter in enumerate(sorted(ByteLevel.alphabet()))}
    end = "<|endoftext|>"
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], pad_token=end, additional_special_tokens=SPECIAL)
    tokenizer.save_pretrained(path)
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    config.save_pretrained(path)
    return config, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`, the configuration and tokenizer of a small Qwen2-VL, and `HPSv3.safetensors` with random weights."""
    root = tmp_path_factory.mktemp("hpsv3")
    config, tokenizer = save_base(root / "base")
    network = Qwen2VLForConditionalGeneration(config)
    network.resize_token_embeddings(len(tokenizer) + 1)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, value in network.state_dict().items():
        random = torch.randn(value.shape, generator=generator) * 0.15
        weights[old_name(name)] = random + 1 if "norm" in name and name.endswith("weight") else random
    for place, shape in {0: (1024, WIDTH), 3: (16, 1024), 5: (2, 16)}.items():
        weights[f"rm_head.{place}.weight"] = torch.randn(shape, generator=generator) * 0.2
        weights[f"rm_head.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.2
    save_file(weights, root / "HPSv3.safetensors")
    return root


def old_name(name):
    """transformers' names as they were when HPSv3 was published."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def built(folder, checkpoint="HPSv3.safetensors", **options):
    options = {"backbone": str(folder / "base"), "dtype": "float32"} | options
    return build_reward("hpsv3", checkpoint=str(folder / checkpoint), **options)
