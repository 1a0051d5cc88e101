"""Trains the tiny preference model: a CLIP whose cosine is how near a picture is to a true one of its caption.

HPSv2's network and checkpoint format, so the product's own HPSv2 reward loads it. It learns from every kind of picture
that RL may push the generator to (wrong, half-right, blurred, noisy, and the generator's own), each with its quality
for all captions: a reward that has only seen true pictures is easily hacked.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from g2rpo_ray.quickstart.pretrain import CAPTIONS, rendered_dataset, to_images, to_pixels
from g2rpo_ray.quickstart.shapes import BACKGROUND, COLOURS, IMAGE_SIZE, SHAPES, templates
from g2rpo_ray.rewards.hpsv2 import new_network, preprocess

TOLERANCE = 0.02  # relative squared error that any true picture may have: the template grid is half a pixel wide
SOFTNESS = 0.5  # relative squared error beyond it at which the quality is 1/e: about a wrong shape
PER_CAPTION = 60
ARCHITECTURE = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def quality(images: NDArray[np.uint8]) -> Tensor:
    """How true each image is to each of CAPTIONS, float32 [N, 48] in [0, 1].

    `exp(-(e - TOLERANCE) / SOFTNESS)`, at most 1, `e` the squared distance to the nearest picture that the renderer can
    draw for the caption, relative to the mean of what both have drawn on the background: symmetric, as a cosine between
    pictures has to be.
    """
    background = torch.tensor(BACKGROUND, dtype=torch.float32)
    contrast = torch.tensor([COLOURS[name] for name in COLOURS], dtype=torch.float32) - background  # [8, 3]
    masks = torch.from_numpy(templates())  # [6, K, 1024]
    energy = masks.square().sum(-1) * contrast.square().sum(-1)[:, None, None]  # [8, 6, K]
    parts = []
    for part in torch.from_numpy(images).split(128):
        shown = part.flatten(1, 2) - background  # [n, 1024, 3]
        matched = torch.einsum("npc,kc->nkp", shown, contrast) @ masks.flatten(0, 1).T  # [n, 8, 6 * K]
        drawn = shown.square().sum((1, 2))[:, None, None, None] + energy  # [n, 8, 6, K]
        parts.append((2 - 4 * matched.unflatten(-1, (len(SHAPES), -1)) / drawn).amin(-1).flatten(1))
    return torch.exp(-(torch.cat(parts) - TOLERANCE).clamp(min=0) / SOFTNESS)


@torch.no_grad()
def training_images(vae: AutoencoderKL, generated: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Pictures of every quality, uint8 [N, 32, 32, 3]: true renderings, five ways to spoil them, and `generated`."""
    true = to_pixels(rendered_dataset(PER_CAPTION, seed)[0])
    # Half of the partners share the colour, since a picture between two shapes is what a generator gets wrong most.
    same_colour = torch.arange(len(true)).view(len(COLOURS), -1)
    same_colour = torch.stack([row[torch.randperm(len(row))] for row in same_colour]).flatten()
    anywhere = torch.randperm(len(true))
    partner = true[torch.where(torch.rand(len(true)) < 0.5, same_colour, anywhere)]
    strength = torch.rand(len(true), 1, 1, 1)
    variants = [
        true,
        true.lerp(partner, strength),
        _splice(true, partner),
        _warp(true, 0.35 * strength),
        _blur(true, strength) + 0.3 * torch.rand(len(true), 1, 1, 1) * torch.randn_like(true),
        _decode_between(vae, true, partner, strength),
    ]
    return np.concatenate([*(to_images(variant) for variant in variants), generated])


def train_preference(images: NDArray[np.uint8], steps: int, batch: int = 128) -> Any:
    """A network of ARCHITECTURE whose cosines are the qualities of `images` for CAPTIONS."""
    targets, pixels = quality(images), preprocess(images, IMAGE_SIZE)
    tokens = SimpleTokenizer(context_length=16)(list(CAPTIONS))
    network = new_network(ARCHITECTURE)
    _forget_unused_tokens(network, tokens)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(pixels), (batch,))
        image_features, text_features, _ = network(pixels[chosen], tokens)  # normalised
        error = image_features @ text_features.T - targets[chosen]
        # Most captions are wrong for most pictures: the few that are nearly right are the ones RL asks about.
        loss = ((0.2 + 4 * targets[chosen] ** 3) * error.square()).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"preference {step}/{steps} loss {loss.item():.4f}", flush=True)
    network.eval()
    return network


def save_preference(network: Any, checkpoint: Path, architecture: Path) -> None:
    """Half-precision weights under `state_dict`, as HPSv2 publishes them, and the description in open_clip's format."""
    torch.save({"state_dict": {name: tensor.half() for name, tensor in network.state_dict().items()}}, checkpoint)
    architecture.write_text(json.dumps(ARCHITECTURE, indent=2) + "\n")


def _forget_unused_tokens(network: Any, tokens: Tensor) -> None:
    """Zeroes what no caption uses of CLIP's 49,408 tokens, which then compresses away, and freezes the rest.

    Random vectors tell two dozen words apart as well as trained ones, and the table is most of the parameters.
    """
    weight = network.token_embedding.requires_grad_(False).weight
    used = torch.zeros(len(weight), 1)
    used[tokens.unique()] = 1
    weight.mul_(used)


def _splice(first: Tensor, second: Tensor) -> Tensor:
    """One side of a random line through the middle from `first`, the other from `second`."""
    axis = torch.linspace(-1, 1, IMAGE_SIZE)
    angle = 2 * torch.pi * torch.rand(len(first), 1, 1)
    return torch.where((angle.cos() * axis + angle.sin() * axis[:, None] > 0)[:, None], first, second)


def _warp(images: Tensor, strength: Tensor) -> Tensor:
    """Smooth random displacement of up to about `strength` [N, 1, 1, 1] half images."""
    coarse = strength * (2 * torch.rand(len(images), 2, 5, 5) - 1)
    shift = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic", align_corners=True)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    grid = identity + shift.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _blur(images: Tensor, strength: Tensor) -> Tensor:
    """Between the sharp image and its 7 x 7 mean."""
    smooth = F.avg_pool2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), 7, stride=1)
    return images.lerp(smooth, strength)


def _decode_between(vae: AutoencoderKL, first: Tensor, second: Tensor, strength: Tensor) -> Tensor:
    """The autoencoder's picture of a noisy point between two latents: what an unsure generator gives."""
    decoded = []
    for one, other, amount in zip(first.split(256), second.split(256), strength.split(256), strict=True):
        latents = vae.encode(one).latent_dist.mode().lerp(vae.encode(other).latent_dist.mode(), amount.square())
        noise = 0.4 * torch.rand_like(amount) * torch.randn_like(latents)
        decoded.append(vae.decode(latents + noise).sample)
    return torch.cat(decoded)
