"""CLIP's preprocessing and features, shared by rewards. Legend: N images, S network's size, D features."""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: NDArray[np.uint8], size: int, squash: bool = False) -> Tensor:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, S, S] as in OpenAI's CLIP: bicubic, by Pillow, on 8 bits.

    The shortest side becomes `size` and the centre is cropped; with `squash` both sides become `size`.
    """
    new_size = [size, size] if squash else [size]
    resized = [TF.resize(Image.fromarray(image), new_size, InterpolationMode.BICUBIC) for image in images]
    pixels = torch.stack([TF.to_tensor(TF.center_crop(image, [size, size])) for image in resized])
    return TF.normalize(pixels, CLIP_MEAN, CLIP_STD)


def cosines(image_features: Tensor, text_features: Tensor) -> NDArray[np.float32]:
    """Cosines float32 [N] of features [N, D] of any dtype, row by row; NaN if not finite."""
    images, texts = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    return finite((images * texts).sum(dim=-1))


Scale = Literal["cosine", "logits", "flow_grpo"]


def check_scale(scale: str) -> None:
    """Raises ValueError for an unknown `scale`."""
    if scale not in get_args(Scale):
        raise ValueError(f"scale: {scale!r} given; allowed are {', '.join(get_args(Scale))}")


def scale_factor(scale: str, logit_scale: Tensor, divisor: float) -> np.float32:
    """The factor of a cosine: 1; the network's logit scale, about 100; or that divided by Flow-GRPO's divisor."""
    logits = logit_scale.float().exp().item()
    return np.float32({"cosine": 1, "logits": logits, "flow_grpo": logits / divisor}[scale])


def finite(scores: Tensor) -> NDArray[np.float32]:
    """Scores [N] as float32 on the host; NaN (missing) if not finite."""
    return scores.float().where(scores.isfinite(), torch.nan).cpu().numpy()
