"""LAION's improved aesthetic predictor: a linear head on CLIP ViT-L/14, about 1 (ugly) to 10. Legend: N images.

Prompts are ignored. github.com/christophschuhmann/improved-aesthetic-predictor,
`sac+logos+ava1-l14-linearMSE.pth`; the default names the same weights on the hub.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPModel

from g2rpo_ray.rewards.features import clip_pixels, finite
from g2rpo_ray.rewards.files import locate
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.weights import check_placement, fit_weights, place, pretrained, read_weights

CHECKPOINT = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"


class ScoreHead(nn.Module):
    """Five linear layers without activations, to one number; ImageReward has the same head.

    Their positions in `layers` are those of the checkpoints, which also count the dropouts of the training.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[N, width] to scores [N]."""
        scores: Tensor = self.layers(features)
        return scores.squeeze(1)


class Aesthetic:
    """The head on a backbone. `score` is one forward pass."""

    def __init__(self, backbone: Any, head: ScoreHead, device: str, dtype: torch.dtype) -> None:
        self._backbone = place(backbone, device, dtype)
        self._head = place(head, device, torch.float32)
        self._size: int = backbone.config.vision_config.image_size
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] of images uint8 [N, H, W, 3]; NaN if not finite."""
        check_images("aesthetic", images, prompts)
        pixels = clip_pixels(images, self._size).to(device=self._device, dtype=self._dtype)
        features = self._backbone.get_image_features(pixel_values=pixels).pooler_output.float()
        return finite(self._head(F.normalize(features, dim=-1)))


def build(
    checkpoint: str = CHECKPOINT,
    backbone: str = "openai/clip-vit-large-patch14",
    device: str = "cpu",
    dtype: str = "float32",
) -> Aesthetic:
    """The reward from `checkpoint`, the head as a path or a hub file `repo:file`, on `backbone`, a directory or hub id.

    `dtype` is the backbone's; the head computes in float32. ValueError, in one line, if an option cannot be used.
    """
    torch_dtype = check_placement(device, dtype)
    path = locate("checkpoint", checkpoint, CHECKPOINT)
    network = pretrained(CLIPModel, "backbone", backbone, dtype=torch_dtype)
    del network.text_model  # unused, a third of the memory
    head = ScoreHead(network.config.projection_dim)
    fit_weights(head, read_weights(path), path, f"a head on the {network.config.projection_dim} features of {backbone}")
    return Aesthetic(network, head, device, torch_dtype)
