"""VideoAlign's VideoReward (arXiv 2501.13918): Qwen2-VL-2B reads a video and its prompt, a head grades three parts.

Checkpoint and computation are those of github.com/KwaiVGI/VideoAlign, the network is transformers'. The checkpoint has
a LoRA, which is merged here. Legend: N videos, F frames, H, W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards.features import finite
from g2rpo_ray.rewards.files import locate
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.qwen2_vl import last_state, load_network, message, open_backbone, split_weights
from g2rpo_ray.rewards.weights import check_placement, fit_weights, place, read_weights

CHECKPOINT = "KwaiVGI/VideoReward:checkpoint-11352/model.pth"
BACKBONE = "Qwen/Qwen2-VL-2B-Instruct"
Part = Literal["visual_quality", "motion_quality", "text_alignment"]
TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")  # at which the head reads, in the order of the parts
MEANS, DEVIATIONS = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)  # of the released model's grades
VIDEO = "<|video_pad|>"
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28  # of a frame
READ_FPS = 2.0  # frames read for a second of video
LEAST_FRAMES, EVEN = 4, 2  # frames are read in pairs
ADAPTED, BASE = "base_model.model.", ".base_layer.weight"  # PEFT's names
SCALE = 128 / 64  # alpha / rank of the released LoRA
# The exact text of the model's training, with blanks at the ends of lines; other words give other scores.
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, Motion "
    "Quality, and Text Alignment. Please provide a rating from 0 to 10 for each of the three categories, with 0 being "
    "the worst and 10 being the best. Each evaluation should be independent of the others.\n\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the video, with a focus on static factors. The following sub-dimensions "
    "should be considered:\n- **Reasonableness:** The video should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n- **Clarity:** Evaluate the "
    "sharpness and visibility of the video. The image should be clear and easy to interpret, with no blurring or "
    "indistinct areas.\n- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and "
    "other visual elements (e.g., hair, clothing, shadows).\n- **Aesthetic and Creativity:** Assess the artistic "
    "aspects of the video, including the color scheme, composition, atmosphere, depth of field, and the overall "
    "creative appeal. The scene should convey a sense of harmony and balance.\n- **Safety:** The video should not "
    "contain harmful or inappropriate content, such as political, violent, or adult material. If such content is "
    "present, the image quality and satisfaction score should be the lowest possible. \n\n"
    f"Please provide the ratings of Visual Quality: {TOKENS[0]}\nEND\n\n"
    "**Motion Quality:**  \nAssess the dynamic aspects of the video, with a focus on dynamic factors. Consider the "
    "following sub-dimensions:\n- **Stability:** Evaluate the continuity and stability between frames. There should "
    "be no sudden, unnatural jumps, and the video should maintain stable attributes (e.g., no fluctuating colors, "
    "textures, or missing body parts).\n- **Naturalness:** The movement should align with physical laws and be "
    "realistic. For example, clothing should flow naturally with motion, and facial expressions should change "
    "appropriately (e.g., blinking, mouth movements).\n- **Aesthetic Quality:** The movement should be smooth and "
    "fluid. The transitions between different motions or camera angles should be seamless, and the overall dynamic "
    "feel should be visually pleasing.\n- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, "
    "hair, clothing) blend naturally with the background, without obvious artifacts or the feeling of cut-and-paste "
    "effects.\n- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas "
    "where the video might have blurry or unsteady sections that hinder visual continuity.\n- **Amplitude:** If the "
    "video is largely static or has little movement, assign a low score for motion quality.\n\n"
    f"Please provide the ratings of Motion Quality: {TOKENS[1]}\nEND\n\n"
    "**Text Alignment:**  \nAssess how well the video matches the textual prompt across the following "
    "sub-dimensions:\n- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description in terms of number, "
    "appearance, and behavior.\n- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, "
    "facial expressions like talking or blinking) align with the described prompt. The motion should match the prompt "
    "in terms of type, scale, and direction.\n- **Environment Relevance:** Assess whether the background and scene fit "
    "the prompt. This includes checking if real-world locations or scenes are accurately represented, though some "
    "stylistic adaptation is acceptable.  \n- **Style Relevance:** If the prompt specifies a particular artistic or "
    "stylistic style, evaluate how well the video adheres to this style.\n- **Camera Movement Relevance:** Check if "
    "the camera movements (e.g., following the subject, focus shifts) are consistent with the expected behavior from "
    "the prompt.\n\nTextual prompt - {prompt}\n"
    f"Please provide the ratings of Text Alignment: {TOKENS[2]}\nEND\n"
)


class VideoAlign:
    """The network and its head. The three parts are one forward pass."""

    scope = "video"

    def __init__(
        self, network: Any, head: nn.Module, tokenizer: Any, device: str, dtype: torch.dtype, part: Part, fps: float
    ) -> None:
        self._network, self._head = place(network, device, dtype), place(head, device, torch.float32)
        self._tokenizer, self._device, self._dtype, self._part, self._fps = tokenizer, device, dtype, part, fps
        vision = network.config.vision_config
        self._merged = vision.spatial_merge_size**2  # patches a token
        self._processor = Qwen2VLVideoProcessor(
            min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, patch_size=vision.patch_size, cap_pixels_per_frame=False,
            merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size,
        )  # fmt: skip
        self._video, *self._read_at = tokenizer.convert_tokens_to_ids([VIDEO, *TOKENS])

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """The part's scores float32 [N] of videos uint8 [N, F, H, W, 3]; see `score_parts`."""
        return self.score_parts(images, prompts)[self._part]

    @torch.no_grad()
    def score_parts(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The scores of all parts, by name: 0 is the released model's average, 1 a deviation; NaN if not finite.

        Raises:
            ValueError: images are not videos of two or more frames with their prompts.
        """
        check_images("videoalign", images, prompts, videos=True)
        if images.shape[1] < EVEN:
            raise ValueError(f"reward videoalign: {images.shape[1]} frames given; it needs {EVEN} or more")
        read = torch.from_numpy(images[:, frames_read(images.shape[1], self._fps)]).permute(0, 1, 4, 2, 3)
        inputs = self._processor(list(read), return_tensors="pt")
        grids = inputs["video_grid_thw"].to(self._device)
        texts = [
            message(VIDEO * (int(grid.prod()) // self._merged), INSTRUCTION, prompt)
            for grid, prompt in zip(grids, prompts, strict=True)
        ]
        tokens = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self._device)
        patches = inputs["pixel_values_videos"].to(device=self._device, dtype=self._dtype)
        ids = tokens["input_ids"]
        state = last_state(self._network, ids, tokens["attention_mask"], patches, grids, self._video)
        rows = torch.arange(len(ids), device=self._device)[:, None]
        grades = self._head(state[rows, self._places(ids)].float())[..., 0]
        mean, deviation = (torch.tensor(each, device=self._device) for each in (MEANS, DEVIATIONS))
        return dict(zip(get_args(Part), finite((grades - mean) / deviation).T, strict=True))

    def _places(self, ids: Tensor) -> Tensor:
        """Of the three tokens, [N, 3]. A prompt may also contain them: it comes after the first two."""
        quality, motion, alignment = ((ids == token).int() for token in self._read_at)
        last = (torch.arange(ids.shape[1], device=self._device) * alignment).argmax(1)
        return torch.stack([quality.argmax(1), motion.argmax(1), last], dim=1)


def frames_read(frames: int, fps: float) -> NDArray[np.int64]:
    """The frames that the released code reads of a video of so many: READ_FPS a second, an even number, 4 or more."""
    wanted = max(frames / fps * READ_FPS, LEAST_FRAMES)
    number = round(min(wanted, frames // EVEN * EVEN) / EVEN) * EVEN
    return torch.linspace(0, frames - 1, number).round().long().numpy()


def build(
    part: Part,
    checkpoint: str = CHECKPOINT,
    backbone: str = BACKBONE,
    fps: float = 16.0,
    device: str = "cpu",
    dtype: str = "bfloat16",
) -> VideoAlign:
    """The reward from `checkpoint`, a path or a hub file as `repo:file`, with all weights and the LoRA.

    `part`: "visual_quality", "motion_quality" or "text_alignment". `backbone`, a directory or hub id, gives the
    network's configuration and the tokenizer. `fps`: frames a second of the videos, 16 of Wan 2.1, 24 of Wan 2.2's 5B.
    `dtype`: bfloat16 as released. ValueError, in one line, if an option cannot be used.
    """
    if part not in get_args(Part):
        raise ValueError(f"part: {part!r} given; allowed are {', '.join(get_args(Part))}")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps: {fps!r} given; allowed are numbers above 0, to 1000")
    torch_dtype = check_placement(device, dtype)
    path = locate("checkpoint", checkpoint, CHECKPOINT)
    weights, of_head = split_weights(merged(read_weights(path), path), path)
    config, tokenizer = open_backbone(backbone, BACKBONE, TOKENS, weights, path)
    head = nn.Linear(config.text_config.hidden_size, 1, bias=False)
    fit_weights(head, of_head, path, f"a head on the {config.text_config.hidden_size} features of {backbone}")
    network = load_network(config, weights, torch_dtype, f"{path} does not fit {backbone}")
    return VideoAlign(network, head, tokenizer, device, torch_dtype, part, fps)


def merged(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights without PEFT's names, each with its LoRA added, computed in float32.

    Raises:
        ValueError: one line; the LoRA of a weight is missing, or one belongs to no weight.
    """
    named = {key.removeprefix(ADAPTED): value for key, value in weights.items()}
    found = {name.replace(".base_layer", ""): value for name, value in named.items() if ".lora_" not in name}
    adapted = {name.removesuffix(BASE) for name in named if name.endswith(BASE)}
    loras = {name for name in named if ".lora_" in name}
    expected = {f"{module}.lora_{part}.default.weight" for module in adapted for part in "AB"}
    if loras != expected:
        wrong = one_line(", ".join(sorted(loras ^ expected)))
        raise ValueError(f"checkpoint: {path} has weights without their LoRA, or the reverse: {wrong}")
    for module in adapted:
        low, high = (named[f"{module}.lora_{part}.default.weight"].float() for part in "AB")
        weight = found[f"{module}.weight"]
        found[f"{module}.weight"] = (weight.float() + SCALE * high @ low).to(weight.dtype)
    return found
