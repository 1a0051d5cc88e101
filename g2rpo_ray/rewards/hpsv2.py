"""HPSv2: the cosine between a picture and its prompt under a CLIP that was tuned on human preferences.

Network and checkpoint format are the `hpsv2` package's own; the default architecture with
`xswu/HPSv2:HPS_v2.1_compressed.pt` is HPSv2.1. Legend: N images and prompts, S the network's image size.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip.tokenizer
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from huggingface_hub import hf_hub_download
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HPSv2:
    """A CLIP-type preference model; `score` is one forward pass over what it is given."""

    def __init__(self, network: Any, architecture: dict[str, Any], device: str, dtype: torch.dtype) -> None:
        self._network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=_context_length(architecture))
        self._image_size: int = architecture["vision_cfg"]["image_size"]
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Cosines float32 [N] of images uint8 [N, H, W, 3] with their prompts; NaN where one is not finite."""
        pixels = preprocess(images, self._image_size).to(device=self._device, dtype=self._dtype)
        tokens = self._tokenizer(list(prompts)).to(self._device)
        image_features = F.normalize(self._network.encode_image(pixels).float(), dim=-1)
        text_features = F.normalize(self._network.encode_text(tokens).float(), dim=-1)
        scores = (image_features * text_features).sum(dim=-1)
        return scores.where(scores.isfinite(), torch.nan).cpu().numpy()


def build(
    checkpoint: str = "xswu/HPSv2:HPS_v2.1_compressed.pt",
    architecture: str = "ViT-H-14",
    device: str = "cpu",
    dtype: str = "float32",
) -> HPSv2:
    """The reward from `checkpoint`, a path or a hub file as `repo:file`.

    `architecture` names one of open_clip's or is the path of a JSON file in open_clip's format; `dtype` is the one
    that the network computes in. ValueError in one line where any of them can't be used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}; float32 reproduces published scores")
    _check_device(device)
    shape = load_architecture(architecture)
    try:
        network = new_network(shape)
    except TypeError as error:
        raise ValueError(f"architecture: {architecture} is not open_clip's format: {_line(error)}") from error
    _load_weights(network, _locate(checkpoint), architecture)
    return HPSv2(network, shape, device, DTYPES[dtype])


def preprocess(images: NDArray[np.uint8], size: int) -> Tensor:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, S, S]: HPSv2's way, which is not open_clip's resize and crop.

    The longest side becomes `size` (bicubic, on the tensor), the rest is padded with zeros on both sides.
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
    path = Path(architecture)
    if not path.is_file():
        raise ValueError(
            f"architecture: {architecture!r} is neither a file nor an open_clip model; "
            "give ViT-H-14 for HPSv2.1 or the path of a JSON file with embed_dim, vision_cfg, text_cfg"
        )
    try:
        described: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"architecture: {architecture} is not JSON: {error}; it must be open_clip's format") from error
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in described]
    if missing:
        raise ValueError(f"architecture: {architecture} lacks {', '.join(missing)}; it must be open_clip's format")
    return described


def new_network(architecture: dict[str, Any]) -> Any:
    """The `hpsv2` package's untyped CLIP module of this architecture, its weights still random."""
    return _bundled_open_clip().CLIP(**architecture)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it is built without that kind of device
        raise ValueError(f"device: {device!r} can't be used ({_line(error)}); cpu always can") from error


def _load_weights(network: nn.Module, path: Path, architecture: str) -> None:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its unpickler, its zip reader or the disk happen to raise
        raise ValueError(f"checkpoint: torch.load(weights_only=True) can't read {path}: {_line(error)}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"checkpoint: {path} has no key 'state_dict'; give a checkpoint as HPSv2 publishes them")
    try:
        network.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint: {path} does not fit architecture {architecture}; give both of one model: {_line(error)}"
        ) from error


def _locate(checkpoint: str) -> Path:
    path = Path(checkpoint)
    if path.is_file():
        return path
    repository, separator, name = checkpoint.partition(":")
    remedy = "give the path of a file, or a hub file as repo:file, e.g. xswu/HPSv2:HPS_v2.1_compressed.pt"
    if not separator:
        raise ValueError(f"checkpoint: no file {checkpoint!r}; {remedy}")
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # network, authentication, offline mode or name: the hub client has a class for each
        raise ValueError(f"checkpoint: {checkpoint!r} can't be fetched ({_line(error)}); {remedy}") from error


def _bundled_open_clip() -> ModuleType:
    """`hpsv2.src.open_clip`, whose wheel lacks the BPE vocabulary that it reads when imported.

    open_clip_torch carries that vocabulary, so its tokenizer module stands in for the bundled one. `turtle`, which the
    package imports by mistake and never uses, needs a Tk that servers and containers rarely have.
    """
    sys.modules.setdefault("hpsv2.src.open_clip.tokenizer", open_clip.tokenizer)
    absent = "turtle" not in sys.modules
    if absent:
        sys.modules["turtle"] = ModuleType("turtle")
        vars(sys.modules["turtle"])["forward"] = None
    try:
        return importlib.import_module("hpsv2.src.open_clip")
    finally:
        if absent:
            del sys.modules["turtle"]


def _context_length(architecture: dict[str, Any]) -> int:
    length: int = architecture["text_cfg"].get("context_length", 77)
    return length


def _line(error: Exception) -> str:
    """The error's text on one line, cut where a state dict would list hundreds of keys."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " …"
