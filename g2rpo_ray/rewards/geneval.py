"""GenEval (arXiv 2310.11513): a detector finds a prompt's objects, CLIP names their colours, rules give the score.

The published scorer uses mmdet's Mask2Former. This one uses a detector of transformers, so its scores are close but not
equal: docs/rewards.md has the differences. Legend: N images, H, W pixels, Q queries, C classes.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerForUniversalSegmentation,
)

from g2rpo_ray.rewards.features import clip_pixels
from g2rpo_ray.rewards.geneval_rules import COLOURS, Definition, Found, Specification, judge, keep, parse_specification
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.weights import check_placement, place, pretrained

logger = logging.getLogger(__name__)

SHORT_SIDE = 800  # pixels of images for Mask2Former
MAX_LONG_SIDE = 1333  # pixels, which may reduce the short side
DIVISOR = 32
MAX_PER_IMAGE = 100  # pairs of query and class that mmdet keeps
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's: GenEval's
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = (0x99, 0x99, 0x99)


class Detector(Protocol):
    """Protocol of detectors."""

    def unknown(self, names: Sequence[str]) -> list[str]:
        """The `names` that it cannot detect."""
        ...

    def find(self, images: NDArray[np.uint8], names: Sequence[str]) -> list[dict[str, list[Found]]]:
        """The objects in each of images [N, H, W, 3], by name, the highest score first."""
        ...


class InstanceSegmenter:
    """Mask2Former with mmdet's post-processing: box and score of an object are computed from its mask."""

    def __init__(self, network: Any, processor: Any, size: int, least: float, device: str, dtype: torch.dtype) -> None:
        self._network, self._processor = place(network, device, dtype), processor
        self._size = {"shortest_edge": size, "longest_edge": round(size * MAX_LONG_SIDE / SHORT_SIDE)}
        self._least, self._device, self._dtype = least, device, dtype
        labels = {name: index for index, name in network.config.id2label.items()}
        self._labels = {GENEVAL_NAMES.get(name, name): index for name, index in labels.items()}

    def unknown(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self._labels]

    def find(self, images: NDArray[np.uint8], names: Sequence[str]) -> list[dict[str, list[Found]]]:
        # the processor would stretch images to a multiple of 32; mmdet pads them
        pixels = self._processor(
            list(images), size=self._size, size_divisor=0, input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"].to(device=self._device, dtype=self._dtype)
        height, width = pixels.shape[-2:]
        padded = F.pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR))
        output = self._network(pixel_values=padded)
        _require_numbers(output.class_queries_logits, output.masks_queries_logits)
        sizes = (padded.shape[-2:], (height, width), images.shape[1:3])
        return [
            self._objects(classes.float(), masks.float(), sizes, names)
            for classes, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        ]

    def _objects(
        self, classes: Tensor, masks: Tensor, sizes: Sequence[Sequence[int]], names: Sequence[str]
    ) -> dict[str, list[Found]]:
        """Objects of one image above the lowest threshold, from class logits [Q, C + 1] and mask logits [Q, h, w]."""
        probabilities = classes.softmax(dim=-1)[:, :-1]
        kinds = probabilities.shape[1]
        best, places = probabilities.flatten().topk(min(MAX_PER_IMAGE, probabilities.numel()))
        found: dict[str, list[Found]] = {}
        for name in names:
            # a mask can only lower a score, so most masks can be skipped
            chosen = (places % kinds == self._labels[name]) & (best > self._least)
            objects = [
                _object(probability, masks[query], sizes)
                for probability, query in zip(best[chosen], places[chosen] // kinds, strict=True)
            ]
            found[name] = sorted(objects, key=lambda one: -one.score)
        return found


def _object(probability: Tensor, mask: Tensor, sizes: Sequence[Sequence[int]]) -> Found:
    """The object of mask logits [h, w]: enlarged to the padded image, cropped to the image, then resized."""
    padded, (height, width), size = sizes
    logits = F.interpolate(mask[None, None], tuple(padded), mode="bilinear", align_corners=False)[..., :height, :width]
    logits = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)[0, 0]
    binary = logits > 0
    certainty = (logits.sigmoid() * binary).sum() / (binary.sum() + 1e-6)
    there = binary.cpu().numpy()
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
    return Found(float(probability * certainty), np.array(box, dtype=np.float64), there)


class OpenVocabulary:
    """Detectors with text input, such as Grounding DINO and OWLv2: one name at a time, without masks."""

    def __init__(self, network: Any, processor: Any, least: float, device: str, dtype: torch.dtype) -> None:
        self._network, self._processor = place(network, device, dtype), processor
        self._least, self._device, self._dtype = least, device, dtype

    def unknown(self, names: Sequence[str]) -> list[str]:
        return []

    def find(self, images: NDArray[np.uint8], names: Sequence[str]) -> list[dict[str, list[Found]]]:
        by_name = {name: self._find_one(images, name) for name in names}
        return [{name: found[at] for name, found in by_name.items()} for at in range(len(images))]

    def _find_one(self, images: NDArray[np.uint8], name: str) -> list[list[Found]]:
        pictures = [Image.fromarray(image) for image in images]
        inputs = self._processor(images=pictures, text=[[name]] * len(images), return_tensors="pt").to(self._device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        output = self._network(**inputs)
        _require_numbers(output.logits, output.pred_boxes)
        sizes = [image.shape[:2] for image in images]
        results = self._processor.post_process_grounded_object_detection(
            output, threshold=self._least, target_sizes=sizes
        )
        return [
            sorted(
                (
                    Found(float(score), box.double().cpu().numpy())
                    for score, box in zip(result["scores"], result["boxes"], strict=True)
                ),
                key=lambda one: -one.score,
            )
            for result in results
        ]


class ColourNamer:
    """CLIP names the colour of an object: it is cut out, and what is not of it is grey."""

    def __init__(self, network: Any, tokenizer: Any, device: str, dtype: torch.dtype) -> None:
        self._network, self._tokenizer = place(network, device, dtype), tokenizer
        self._size: int = network.config.vision_config.image_size
        self._length: int = network.config.text_config.max_position_embeddings
        self._device, self._dtype = device, dtype
        self._directions: dict[str, Tensor] = {}

    def name(self, image: NDArray[np.uint8], kind: str, objects: Sequence[Found]) -> list[str]:
        """One of COLOURS for each of the objects of a kind in image [H, W, 3]."""
        crops: Any = [cut_out(image, one) for one in objects]
        pixels = clip_pixels(crops, self._size).to(device=self._device, dtype=self._dtype)
        features = F.normalize(self._network.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        _require_numbers(features)
        return [COLOURS[index] for index in (features @ self._colours_of(kind).T).argmax(dim=-1)]

    def _colours_of(self, kind: str) -> Tensor:
        """Directions [colours, D]: the mean over TEMPLATES."""
        if kind not in self._directions:
            texts = [template.format(colour=colour, name=kind) for colour in COLOURS for template in TEMPLATES]
            padding = {"padding": "max_length", "truncation": True, "max_length": self._length}
            tokens = self._tokenizer(texts, **padding, return_tensors="pt").to(self._device)
            features = F.normalize(self._network.get_text_features(**tokens).pooler_output.float(), dim=-1)
            mean = features.reshape(len(COLOURS), len(TEMPLATES), -1).mean(dim=1)
            self._directions[kind] = F.normalize(mean, dim=-1)
        return self._directions[kind]


def _require_numbers(*outputs: Tensor) -> None:
    """Raises ArithmeticError if a network overflowed: its images then have no score instead of a low one."""
    if any(output.isnan().any() for output in outputs):
        raise ArithmeticError("geneval: a network's output is not a number; give dtype: float32 or bfloat16")


def cut_out(image: NDArray[np.uint8], found: Found) -> NDArray[np.uint8]:
    """The box of an object [h, w, 3], grey outside its mask."""
    left, top, right, bottom = np.rint(found.box).astype(int)
    height, width = image.shape[:2]
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    place = slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))
    if found.mask is None:
        return image[place]
    return np.where(found.mask[place][..., None], image[place], np.array(BACKGROUND, np.uint8))


class GenEval:
    """The reward: a detector, CLIP and the rules."""

    def __init__(
        self, detector: Detector, colours: ColourNamer, definition: Definition, thresholds: tuple[float, float],
        max_overlap: float,
    ) -> None:  # fmt: skip
        self._detector, self._colours, self._definition = detector, colours, definition
        self._threshold, self._counting_threshold = thresholds
        self._max_overlap = max_overlap

    @torch.no_grad()
    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        """Scores float32 [N] of images uint8 [N, H, W, 3]; NaN without a valid specification in the metadata."""
        check_images("geneval", images, prompts)
        wanted = [self._specification(*pair) for pair in zip(prompts, metadata, strict=True)]
        names = {clause.name: None for one in wanted if one for clause in (*one.include, *one.exclude)}
        found = self._detector.find(images, list(names)) if names else [{}] * len(images)
        scores = [self._judge(*triple) for triple in zip(images, wanted, found, strict=True)]
        return np.array(scores, dtype=np.float32)

    def _specification(self, prompt: str, metadata: Mapping[str, Any]) -> Specification | None:
        try:
            wanted = parse_specification(metadata)
        except ValueError as error:
            logger.warning("geneval: no score for %r: it %s", prompt, error)
            return None
        unknown = self._detector.unknown([clause.name for clause in (*wanted.include, *wanted.exclude)])
        if unknown:
            logger.warning("geneval: no score for %r: the detector does not know %s", prompt, ", ".join(unknown))
        return None if unknown else wanted

    def _judge(self, image: NDArray[np.uint8], wanted: Specification | None, found: dict[str, list[Found]]) -> float:
        if wanted is None:
            return float("nan")
        threshold = self._counting_threshold if wanted.tag == "counting" else self._threshold
        objects = keep(found, threshold, self._max_overlap)
        return judge(wanted, objects, partial(self._colours.name, image), self._definition)


def build(
    model: str = "facebook/mask2former-swin-small-coco-instance",
    colour_model: str = "openai/clip-vit-large-patch14",
    definition: Definition = "graded",
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    max_overlap: float = 1.0,
    size: int = SHORT_SIDE,
    device: str = "cpu",
    dtype: str = "float32",
) -> GenEval:
    """The reward from a detector and a CLIP, each a directory in transformers' format or a hub id.

    Args:
        model: a Mask2Former of instances, or a detector with text input, whose own processor resizes images.
        colour_model: the CLIP.
        definition: "graded", "strict" or "published"; see docs/rewards.md.
        threshold: minimum score of an object.
        counting_threshold: the same for prompts with the tag counting.
        max_overlap: see `keep`.
        size: pixels of the shortest side for Mask2Former.
        device: of both networks.
        dtype: of both networks.

    Raises:
        ValueError: one line; an option cannot be used.
    """
    torch_dtype = check_placement(device, dtype)
    if definition not in get_args(Definition):
        raise ValueError(f"definition: {definition!r} given; allowed are {', '.join(get_args(Definition))}")
    shares = {"threshold": threshold, "counting_threshold": counting_threshold, "max_overlap": max_overlap}
    for option, given in shares.items():
        if not 0 < given <= 1:
            raise ValueError(f"{option}: {given} given; must be above 0 and at most 1")
    if not 32 <= size <= MAX_LONG_SIDE:
        raise ValueError(f"size: {size} given; must be from 32 to {MAX_LONG_SIDE} pixels")
    least = min(threshold, counting_threshold)
    detector: Detector
    if pretrained(AutoConfig, "model", model).model_type == "mask2former":
        network = pretrained(Mask2FormerForUniversalSegmentation, "model", model, dtype=torch_dtype)
        processor = pretrained(AutoImageProcessor, "model", model)
        detector = InstanceSegmenter(network, processor, size, least, device, torch_dtype)
    else:
        network = pretrained(AutoModelForZeroShotObjectDetection, "model", model, dtype=torch_dtype)
        processor = pretrained(AutoProcessor, "model", model)
        detector = OpenVocabulary(network, processor, least, device, torch_dtype)
    clip = pretrained(CLIPModel, "colour_model", colour_model, dtype=torch_dtype)
    colours = ColourNamer(clip, pretrained(CLIPTokenizer, "colour_model", colour_model), device, torch_dtype)
    return GenEval(detector, colours, definition, (threshold, counting_threshold), max_overlap)
