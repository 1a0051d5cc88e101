"""ImageReward (arXiv 2304.05977): BLIP encodes the prompt and the image together, a head scores the result.

The `image-reward` package cannot be imported with transformers 5, so its network is rebuilt from timm's vision
transformer, transformers' BLIP text encoder and the head, whose names are the checkpoint's. Legend: N images and
prompts, S the network's image size, L tokens of a prompt.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel

from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards.aesthetic import ScoreHead
from g2rpo_ray.rewards.features import clip_pixels, finite
from g2rpo_ray.rewards.files import locate, read_json
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.weights import check_placement, fit_weights, place, read_weights

CHECKPOINT = "THUDM/ImageReward:ImageReward.pt"
VOCABULARY = "google-bert/bert-base-uncased:vocab.txt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores over the authors' data
MAX_TOKENS = 35
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")  # in the file, no layer
ARCHITECTURE: dict[str, dict[str, Any]] = {
    "vision": {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "text": {"vocab_size": 30524, "num_attention_heads": 12},  # transformers' default of 8 heads is not BLIP's
}


class Network(nn.Module):
    """BLIP and the head, with the checkpoint's names."""

    def __init__(self, architecture: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        text = BlipTextConfig(encoder_hidden_size=architecture["vision"]["embed_dim"], **architecture["text"])
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": VisionTransformer(num_classes=0, **architecture["vision"]),
                "text_encoder": BlipTextModel(text, add_pooling_layer=False),
            }
        )
        self.mlp = ScoreHead(text.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Standardised scores [N] of pixels [N, 3, S, S] and tokens, mask [N, L]."""
        vision: Any = self.blip["visual_encoder"]
        state = self.blip["text_encoder"](
            tokens, attention_mask=attention_mask, encoder_hidden_states=vision.forward_features(pixels)
        ).last_hidden_state
        scores: Tensor = self.mlp(state[:, 0].float())
        return (scores - MEAN) / STD


class ImageReward:
    """BLIP and its head. `score` is one forward pass."""

    def __init__(self, network: Network, tokenizer: BertWordPieceTokenizer, size: int, device: str, dtype: torch.dtype):
        place(network.blip, device, dtype)
        place(network.mlp, device, torch.float32)
        self._network = network
        self._tokenizer, self._size, self._device, self._dtype = tokenizer, size, device, dtype

    @torch.no_grad()
    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] of images uint8 [N, H, W, 3], each with its own prompt; NaN if not finite."""
        check_images("imagereward", images, prompts)
        pixels = clip_pixels(images, self._size).to(device=self._device, dtype=self._dtype)
        encodings = self._tokenizer.encode_batch(list(prompts))
        tokens = torch.tensor([encoding.ids for encoding in encodings], device=self._device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=self._device)
        return finite(self._network(pixels, tokens, mask))


def build(
    checkpoint: str = CHECKPOINT,
    vocabulary: str = VOCABULARY,
    architecture: str = "",
    device: str = "cpu",
    dtype: str = "float32",
) -> ImageReward:
    """The reward from `checkpoint` and BERT's `vocabulary` (one token per line), each a path or a hub file `repo:file`.

    `architecture` is the path of a JSON file like ARCHITECTURE, for a network of another size than the published one;
    `dtype` is BLIP's, the head computes in float32. ValueError, in one line, if an option cannot be used.
    """
    torch_dtype = check_placement(device, dtype)
    meaning = "arguments of timm's VisionTransformer and transformers' BlipTextConfig under vision and text"
    shape = read_json("architecture", architecture, tuple(ARCHITECTURE), meaning) if architecture else ARCHITECTURE
    try:
        network = Network(shape)
        size, words = shape["vision"]["img_size"], shape["text"]["vocab_size"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"architecture: {architecture} is not {meaning}: {one_line(error)}") from error
    tokenizer = load_tokenizer(vocabulary, words)
    path = locate("checkpoint", checkpoint, CHECKPOINT)
    weights = {key: value for key, value in read_weights(path).items() if not key.startswith(UNUSED)}
    fit_weights(network, weights, path, f"architecture {architecture}" if architecture else "ImageReward v1.0")
    return ImageReward(network, tokenizer, size, device, torch_dtype)


def load_tokenizer(vocabulary: str, size: int) -> BertWordPieceTokenizer:
    """BERT's uncased tokenizer with BLIP's two special tokens, `size` in all; it pads or truncates to MAX_TOKENS."""
    path = locate("vocabulary", vocabulary, VOCABULARY)
    try:
        tokenizer = BertWordPieceTokenizer.from_file(str(path), lowercase=True)
    except Exception as error:  # the Rust library raises Exception, and TypeError if [CLS] or [SEP] is missing
        raise ValueError(
            f"vocabulary: {path} is not BERT's vocabulary, one token per line: {one_line(error)}"
        ) from error
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
    if tokenizer.get_vocab_size() != size:
        found = f"{tokenizer.get_vocab_size()} tokens with [DEC] and [ENC]"
        raise ValueError(f"vocabulary: {path} has {found}, the network {size}; give the network's own")
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    return tokenizer
