"""A whole CLIP with random weights, as transformers saves it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer


def randomise(weights: Mapping[str, Tensor], scale: float = 0.3) -> dict[str, Tensor]:
    """Every weight and bias random: initial values such as 0 would hide a layer that is left out."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) * scale for key, value in weights.items()}


def letters_tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of letters and two words; `length` tokens a prompt."""
    words = ["a</w>", "cat</w>", *(c for c in "abcdefghijklmnopqrstuvwxyz,."), "<|startoftext|>", "<|endoftext|>"]
    words += [c + "</w>" for c in "bcdefghijklmnopqrstuvwxyz,."]
    return CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[], model_max_length=length)


def clip_sizes(tokenizer: CLIPTokenizer) -> dict[str, dict[str, Any]]:
    """Sizes of the two encoders, for pictures of 16 pixels in patches of 8."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    return {"text_config": text, "vision_config": sizes | {"image_size": 16, "patch_size": 8}}


def write_tiny_clip(folder: Path) -> dict[str, str]:
    """The model and its processor below `folder`: their paths, by PickScore's options."""
    tokenizer = letters_tokenizer(24)
    network = CLIPModel(CLIPConfig(**clip_sizes(tokenizer), projection_dim=12))
    network.load_state_dict(randomise(network.state_dict()) | {"logit_scale": torch.tensor(4.6)}, strict=False)
    network.save_pretrained(folder / "model")
    size: Any = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(folder / "processor")
    return {"model": str(folder / "model"), "processor": str(folder / "processor")}
