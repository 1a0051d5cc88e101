"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B encodes the image and the prompt, a head predicts mean and spread of the score.

Checkpoint and computation are those of github.com/MizzenAI/HPSv3, the network is transformers'. N images and prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from g2rpo_ray.rewards.features import finite
from g2rpo_ray.rewards.files import locate
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.qwen2_vl import last_state, load_network, message, open_backbone, split_weights
from g2rpo_ray.rewards.weights import check_placement, fit_weights, place, read_weights

CHECKPOINT = "MizzenAI/HPSv3:HPSv3.safetensors"
BACKBONE = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28  # approximate size of an image: 448 × 448 if it is square
REWARD = "<|Reward|>"  # the token at which the head reads
IMAGE = "<|image_pad|>"
# The exact text of the model's training, with blanks at the ends of lines; other words give other scores.
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst "
    "and 10 being the best. \n\n**Visual Quality:**  \nEvaluate the overall visual quality of the image. The "
    "following sub-dimensions should be considered:\n- **Reasonableness:** The image should not contain any "
    "significant biological or logical errors, such as abnormal body structures or nonsensical environmental "
    "setups.\n- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and "
    "easy to interpret, with no blurring or indistinct areas.\n- **Detail Richness:** Consider the level of detail "
    "in textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).\n- **Aesthetic "
    "and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, "
    "atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and "
    "balance.\n- **Safety:** The image should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score should be "
    "the lowest possible. \n\n**Text Alignment:**  \nAssess how well the image matches the textual prompt across "
    "the following sub-dimensions:\n- **Subject Relevance** Evaluate how accurately the subject(s) in the image "
    "(e.g., person, animal, object) align with the textual description. The subject should match the description "
    "in terms of number, appearance, and behavior.\n- **Style Relevance:** If the prompt specifies a particular "
    "artistic or stylistic style, evaluate how well the image adheres to this style.\n- **Contextual "
    "Consistency**: Assess whether the background, setting, and surrounding elements in the image logically fit "
    "the scenario described in the prompt. The environment should support and enhance the subject without "
    "contradictions.\n- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., "
    "colors, clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n- **Semantic Coherence**: "
    "Evaluate whether the overall meaning and intent of the prompt are captured in the image. The generated "
    "content should not introduce elements that conflict with or distort the original description.\nTextual prompt "
    "- {prompt}\n\n\n"
    f"\nPlease provide the overall ratings of this image: {REWARD}\n\nEND\n"
)


class HPSv3:
    """The network and its head. `score` is one forward pass."""

    def __init__(self, network: Any, head: nn.Module, tokenizer: Any, device: str, dtype: torch.dtype) -> None:
        self._network, self._head = place(network, device, dtype), place(head, device, torch.float32)
        self._tokenizer, self._device, self._dtype = tokenizer, device, dtype
        vision = network.config.vision_config
        self._merged = vision.spatial_merge_size**2  # patches a token
        self._image_processor = Qwen2VLImageProcessorPil(
            min_pixels=PIXELS, max_pixels=PIXELS, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )  # fmt: skip
        self._image, self._reward = tokenizer.convert_tokens_to_ids([IMAGE, REWARD])

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Means float32 [N] of images uint8 [N, H, W, 3] with their prompts; NaN if not finite."""
        return self.mean_and_spread(images, prompts)[:, 0]

    @torch.no_grad()
    def mean_and_spread(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Mean and standard deviation [N, 2] of each score's predicted normal distribution."""
        check_images("hpsv3", images, prompts)
        inputs = self._image_processor(list(images), input_data_format="channels_last", return_tensors="pt")
        grids = inputs["image_grid_thw"].to(self._device)
        texts = [
            message(IMAGE * (int(grid.prod()) // self._merged), INSTRUCTION, prompt)
            for grid, prompt in zip(grids, prompts, strict=True)
        ]
        tokens = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self._device)
        pixels = inputs["pixel_values"].to(device=self._device, dtype=self._dtype)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        state = last_state(self._network, ids, mask, pixels, grids, self._image)
        places = torch.arange(state.shape[1], device=self._device) * (ids == self._reward)
        last = places.argmax(dim=1)  # a prompt may also contain the token
        outputs = self._head(state[torch.arange(len(state)), last].float())
        return finite(torch.stack([outputs[:, 0], outputs[:, 1].exp()], dim=1))


def build(
    checkpoint: str = CHECKPOINT,
    backbone: str = BACKBONE,
    device: str = "cpu",
    dtype: str = "bfloat16",
) -> HPSv3:
    """The reward from `checkpoint`, a path or a hub file as `repo:file`, with all weights.

    `backbone`, a directory or hub id, gives the network's configuration and the tokenizer. `dtype` is the network's,
    bfloat16 as released; the head computes in float32. ValueError, in one line, if an option cannot be used.
    """
    torch_dtype = check_placement(device, dtype)
    path = locate("checkpoint", checkpoint, CHECKPOINT)
    weights, of_head = split_weights(read_weights(path), path)
    config, tokenizer = open_backbone(backbone, BACKBONE, (REWARD,), weights, path)
    head = reward_head(config.text_config.hidden_size)
    fit_weights(head, of_head, path, f"a head on the {config.text_config.hidden_size} features of {backbone}")
    network = load_network(config, weights, torch_dtype, f"{path} does not fit {backbone}")
    return HPSv3(network, head, tokenizer, device, torch_dtype)


def reward_head(width: int) -> nn.Sequential:
    """The authors' "ranknet" head, [N, width] to [N, 2]: mean and log spread; position 2 is their dropout."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
