"""What rewards on Qwen2-VL share: weights under older names, the network, and its last state.

As in the released code of these rewards, and unlike Qwen2-VL, the tokens of a picture or video have consecutive
positions, like text. Legend: N samples, L tokens, D features.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards.weights import pretrained

# Prefixes of the network's parts in older and newer checkpoints, longest first; lm_head is not needed.
PARTS = {
    "model.language_model.": "language_model.",
    "model.visual.": "visual.",
    "model.": "language_model.",
    "visual.": "visual.",
}
EMBEDDING = "language_model.embed_tokens.weight"
HEAD = "rm_head."
MESSAGE = (  # Qwen2-VL's own template
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{shown}"
    "<|vision_end|>{instruction}<|im_end|>\n<|im_start|>assistant\n"
)


def message(shown: str, instruction: str, prompt: str) -> str:
    """What the user says, in Qwen2-VL's template: a picture or video, in tokens, and an instruction with {prompt}."""
    return MESSAGE.replace("{shown}", shown).replace("{instruction}", instruction).replace("{prompt}", prompt)


def split_weights(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's weights for transformers' Qwen2VLModel, and those of the head.

    Raises:
        ValueError: one line; there is no embedding of tokens.
    """
    network: dict[str, Tensor] = {}
    for key, value in weights.items():
        part = next((part for part in PARTS if key.startswith(part)), None)
        if part:
            network[PARTS[part] + key.removeprefix(part)] = value
    if EMBEDDING not in network:
        raise ValueError(f"checkpoint: {path} has no embedding of tokens; give the file as published")
    return network, {key.removeprefix(HEAD): value for key, value in weights.items() if key.startswith(HEAD)}


def open_backbone(
    backbone: str, published: str, tokens: tuple[str, ...], weights: Mapping[str, Tensor], path: Path
) -> tuple[Any, Any]:
    """Configuration and tokenizer of the base model, with these special tokens, as many as the weights have.

    Raises:
        ValueError: one line; the base model cannot be read, or has another number of tokens.
    """
    config = pretrained(Qwen2VLConfig, "backbone", backbone)
    tokenizer = pretrained(AutoTokenizer, "backbone", backbone)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    words = len(weights[EMBEDDING])
    if len(tokenizer) != words:
        raise ValueError(
            f"backbone: {backbone} has {len(tokenizer)} tokens with {', '.join(tokens)}, {path} {words}; give its base "
            f"model, {published}"
        )
    config.text_config.vocab_size = words
    return config, tokenizer


def load_network(config: Any, weights: dict[str, Tensor], dtype: torch.dtype, problem: str) -> Any:
    """transformers' network with these weights, without random initialisation, which would take minutes."""
    try:
        loaded: Any = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:  # a shape that does not fit
        raise ValueError(f"checkpoint: {problem}: {one_line(error)}") from error
    network, report = loaded
    wrong = [f"{kind.partition('_')[0]} {key}" for kind in ("missing_keys", "unexpected_keys") for key in report[kind]]
    if wrong:
        raise ValueError(f"checkpoint: {problem}: {one_line(', '.join(sorted(wrong)))}")
    return network


def last_state(network: Any, ids: Tensor, mask: Tensor, patches: Tensor, grids: Tensor, place: int) -> Tensor:
    """The last hidden state [N, L, D]; without `position_ids`, tokens have consecutive positions.

    Args:
        network: transformers' Qwen2VLModel.
        ids: tokens [N, L]; `mask` is 1 where there are any.
        patches: of pictures or videos, and `grids` [N, 3] of them, as transformers' processors return them.
        place: the token in whose place a picture or video is read.
    """
    language = network.language_model
    embedded = language.embed_tokens(ids)
    seen = network.visual(patches, grid_thw=grids).pooler_output.to(embedded.dtype)
    embedded = embedded.masked_scatter((ids == place)[..., None], seen)
    state: Tensor = language(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
    return state
