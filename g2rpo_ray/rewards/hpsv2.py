"""HPSv2: the cosine between an image and its prompt under a CLIP that was tuned on human preferences.

Network and checkpoint format are the `hpsv2` package's own; the default architecture with
`xswu/HPSv2:HPS_v2.1_compressed.pt` is HPSv2.1. Legend: N images and prompts, S the network's image size.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip.tokenizer
import torch
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode

from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards.features import CLIP_MEAN, CLIP_STD, cosines
from g2rpo_ray.rewards.files import locate, read_json
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.weights import check_placement, fit_weights, place, read_weights

CHECKPOINT = "xswu/HPSv2:HPS_v2.1_compressed.pt"


class HPSv2:
    """A CLIP-type preference model. `score` is one forward pass."""

    def __init__(self, network: Any, architecture: dict[str, Any], device: str, dtype: torch.dtype) -> None:
        self._network = place(network, device, dtype)
        self._tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=_context_length(architecture))
        self._image_size: int = architecture["vision_cfg"]["image_size"]
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Cosines float32 [N] of images uint8 [N, H, W, 3] with their prompts; NaN if not finite."""
        check_images("hpsv2", images, prompts)
        pixels = preprocess(images, self._image_size).to(device=self._device, dtype=self._dtype)
        tokens = self._tokenizer(list(prompts)).to(self._device)
        return cosines(self._network.encode_image(pixels), self._network.encode_text(tokens))


def build(
    checkpoint: str = CHECKPOINT,
    architecture: str = "ViT-H-14",
    device: str = "cpu",
    dtype: str = "float32",
) -> HPSv2:
    """The reward from `checkpoint`, a path or a hub file as `repo:file`.

    `architecture` is a name of open_clip's or the path of a JSON file in its format; `dtype` is the network's.
    ValueError, in one line, if an option cannot be used.
    """
    torch_dtype = check_placement(device, dtype)
    shape = load_architecture(architecture)
    try:
        network = new_network(shape)
    except TypeError as error:
        raise ValueError(f"architecture: {architecture} is not open_clip's format: {one_line(error)}") from error
    path = locate("checkpoint", checkpoint, CHECKPOINT)
    fit_weights(network, read_weights(path, "state_dict"), path, f"architecture {architecture}")
    return HPSv2(network, shape, device, torch_dtype)


def preprocess(images: NDArray[np.uint8], size: int) -> Tensor:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, S, S] as in HPSv2, which differs from open_clip.

    The longest side becomes `size` (bicubic, on the tensor), the other is padded with zeros on both sides.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        new_size = [round(height * scale), round(width * scale)]
        pixels = TF.resize(pixels, new_size, InterpolationMode.BICUBIC)
    missing_y, missing_x = size - pixels.shape[-2], size - pixels.shape[-1]
    padding = [missing_x // 2, missing_y // 2, missing_x - missing_x // 2, missing_y - missing_y // 2]
    return TF.normalize(TF.pad(pixels, padding, fill=0), CLIP_MEAN, CLIP_STD)


def load_architecture(architecture: str) -> dict[str, Any]:
    """open_clip's model description by name, or from a JSON file: `embed_dim`, `vision_cfg`, `text_cfg`."""
    bundled = _bundled_open_clip()
    known: dict[str, Any] | None = bundled.get_model_config(architecture)
    if known is not None:
        return known
    if not Path(architecture).is_file():
        raise ValueError(
            f"architecture: {architecture!r} is neither a file nor an open_clip model; "
            "give ViT-H-14 for HPSv2.1 or the path of a JSON file with embed_dim, vision_cfg, text_cfg"
        )
    return read_json("architecture", architecture, ("embed_dim", "vision_cfg", "text_cfg"), "open_clip's format")


def new_network(architecture: dict[str, Any]) -> Any:
    """The `hpsv2` package's untyped CLIP module of this architecture, with random weights."""
    return _bundled_open_clip().CLIP(**architecture)


def _bundled_open_clip() -> ModuleType:
    """`hpsv2.src.open_clip`, whose wheel lacks the BPE vocabulary that it reads at import.

    open_clip_torch has that vocabulary, so its tokenizer module replaces the bundled one. The package imports `turtle`
    without using it, and servers rarely have the Tk that it needs.
    """
    sys.modules.setdefault("hpsv2.src.open_clip.tokenizer", open_clip.tokenizer)
    absent = "turtle" not in sys.modules
    if absent:
        sys.modules["turtle"] = ModuleType("turtle")
        vars(sys.modules["turtle"])["forward"] = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of timm's layout, which users cannot change
            return importlib.import_module("hpsv2.src.open_clip")
    finally:
        if absent:
            del sys.modules["turtle"]


def _context_length(architecture: dict[str, Any]) -> int:
    length: int = architecture["text_cfg"].get("context_length", 77)
    return length
