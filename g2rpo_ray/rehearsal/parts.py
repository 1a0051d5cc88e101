"""Text parts of a pipeline, small: tokenizers of letters, and encoders of two layers with random weights, by class.

An encoder reads what its tokenizer makes and gives embeddings of WIDTH.
"""

import string
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

WIDTH = 16
LENGTH = 2048  # tokens, of models that read chats: a template of letters is long
CHARACTERS = string.ascii_lowercase + string.digits
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
PARTS_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)
MISTRAL_CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}{% endfor %}"
)


VISION = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""Tokens around pictures in Qwen's chats, by the names of their ids in a model's configuration."""


def clip_tokenizer(length: int = 24) -> Any:
    tokens = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab=_numbered(tokens), merges=[], model_max_length=length)


def t5_tokenizer() -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return transformers.T5Tokenizer(vocab=special + [(c, -3.0) for c in CHARACTERS], extra_ids=0)


def qwen_tokenizer() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION.values()]
    tokenizer = transformers.Qwen2Tokenizer(vocab=_numbered([*string.printable.strip(), "Ġ", "Ċ", *special]), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS, *string.ascii_uppercase, *"<>-.,"]
    return transformers.GemmaTokenizer(vocab=_numbered(tokens))


def pixtral_processor() -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    images = transformers.PixtralImageProcessor()
    return transformers.PixtralProcessor(images, tokenizer, chat_template=MISTRAL_CHAT)


def qwen_vl_processor() -> Any:
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return transformers.Qwen2VLProcessor(images, qwen_tokenizer(), transformers.Qwen2VLVideoProcessor())


def qwen3_vl_processor() -> Any:
    images = transformers.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=2048 * 2048)
    videos = transformers.Qwen3VLVideoProcessor()
    return transformers.Qwen3VLProcessor(images, qwen_tokenizer(), videos, chat_template=PARTS_CHAT)


def clip(tokenizer: Any, kind: Any, width: int = WIDTH, layers: int = 2) -> nn.Module:
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, projection_dim=width, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=layers, max_position_embeddings=tokenizer.model_max_length, **ends,
    )  # fmt: skip
    made: nn.Module = kind(config)
    return made


def t5(tokenizer: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def umt5(tokenizer: Any) -> nn.Module:
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.UMT5EncoderModel(config)


def language(tokenizer: Any, kind: Any, layers: int = 2) -> Any:
    """A language model's configuration of class `kind`."""
    return kind(
        vocab_size=_words(tokenizer), hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=LENGTH,
    )  # fmt: skip


def qwen_vl(tokenizer: Any) -> nn.Module:
    text = {
        "vocab_size": _words(tokenizer), "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LENGTH,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION.items()}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(processor: Any) -> nn.Module:
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": _words(tokenizer), "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": LENGTH,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION.items()}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen3VLForConditionalGeneration(config)


def mistral(processor: Any) -> nn.Module:
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = language(processor.tokenizer, transformers.MistralConfig, 31)  # FLUX.2 reads the 10th, 20th and 30th
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    return transformers.Mistral3ForConditionalGeneration(config)


def _words(tokenizer: Any) -> int:
    return max(128, len(tokenizer))


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


@torch.no_grad()
def randomise(network: nn.Module, factor: float) -> None:
    """No weight without effect: what starts at zero, or as it lay in memory, is drawn; matrices are made larger."""
    for name, parameter in network.named_parameters():
        if name.endswith("pad_token") or (parameter.std() == 0 and parameter.mean() == 0):
            parameter.normal_(0, 0.2)
        elif parameter.ndim > 1:
            parameter.mul_(factor)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": clip_tokenizer,
    "T5Tokenizer": t5_tokenizer,
    "Qwen2Tokenizer": qwen_tokenizer,
    "GemmaTokenizer": gemma_tokenizer,
    "PixtralProcessor": pixtral_processor,
    "Qwen2VLProcessor": qwen_vl_processor,
    "Qwen3VLProcessor": qwen3_vl_processor,
}
"""By class; one whose name ends in `Fast` is of the same kind."""

ENCODERS: dict[str, Callable[[Any, int], nn.Module]] = {
    "CLIPTextModel": lambda tokenizer, width: clip(tokenizer, transformers.CLIPTextModel, width),
    "CLIPTextModelWithProjection": lambda tokenizer, width: clip(
        tokenizer, transformers.CLIPTextModelWithProjection, width
    ),
    "T5EncoderModel": lambda tokenizer, _: t5(tokenizer),
    "UMT5EncoderModel": lambda tokenizer, _: umt5(tokenizer),
    "Qwen2_5_VLForConditionalGeneration": lambda tokenizer, _: qwen_vl(tokenizer),
    "Qwen3VLForConditionalGeneration": lambda processor, _: qwen3_vl(processor),
    "Qwen3Model": lambda tokenizer, _: transformers.Qwen3Model(language(tokenizer, transformers.Qwen3Config)),
    "Qwen3ForCausalLM": lambda tokenizer, _: transformers.Qwen3ForCausalLM(
        language(tokenizer, transformers.Qwen3Config, 28)  # FLUX.2 klein reads the 9th, 18th and 27th
    ),
    "Mistral3ForConditionalGeneration": lambda processor, _: mistral(processor),
    "Gemma2Model": lambda tokenizer, _: transformers.Gemma2Model(language(tokenizer, transformers.Gemma2Config)),
}
"""By class, of a tokenizer and the width that a CLIP has where there are several."""
