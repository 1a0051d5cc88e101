"""Trains a world's preference model: a CLIP whose cosine is how near a picture is to a true one of its caption.

HPSv2's network and checkpoint format, so the product's own HPSv2 reward loads it. It learns from every kind of picture
that RL may push the generator to (wrong, half-right, blurred, noisy, and the generator's own), each with its quality
for many captions: a reward that has only seen true pictures is easily hacked.
"""

import io
import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from g2rpo_ray.rewards.hpsv2 import new_network, preprocess
from g2rpo_ray.world_builder.pipeline import to_images, to_pixels
from g2rpo_ray.world_builder.pretrain import descend, faster, new_optimizers
from g2rpo_ray.world_builder.world import Pictures, World


@torch.no_grad()
def training_images(world: World, vae: AutoencoderKL, generated: Pictures) -> Pictures:
    """Pictures of every quality: true ones, five ways to spoil them, and `generated`."""
    images, partners = world.lesson()
    true = to_pixels(images)
    partner = true[partners]
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


def train_preference(world: World, images: Pictures, batch: int = 128) -> Any:
    """A network whose cosines are what the world's judge says of `images`."""
    size, length = world.image_size, world.preference["text_cfg"]["context_length"]
    judge, pixels = world.judge(images), preprocess(images, size)
    tokens = SimpleTokenizer(context_length=length)(list(world.captions))
    network = new_network(world.preference)
    _forget_unused_tokens(network, tokens)
    steps = world.preference_steps
    optimizers = new_optimizers(network, world.muon, lr=2e-3)
    cycle = partial(OneCycleLR, max_lr=2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=not world.muon)
    schedules = [cycle(optimizer) for optimizer in optimizers]
    for step in range(steps):
        chosen = torch.randint(len(pixels), (batch,))
        captions, targets = judge(chosen)
        with faster(world.mixed_precision):
            image_features, text_features, _ = network(pixels[chosen], tokens[captions])  # normalised
        error = image_features.float() @ text_features.float().T - targets
        # Most captions are wrong for most pictures: the few that are nearly right are the ones RL asks about.
        loss = ((0.2 + 4 * targets**3) * error.square()).sum(dim=1).mean()
        descend(loss, optimizers, network.parameters())
        for schedule in schedules:
            schedule.step()
        if step % 100 == 0:
            print(f"preference {step}/{steps} loss {loss.item():.4f}", flush=True)
    network.eval()
    return network


def save_preference(world: World, network: Any, directory: Path) -> None:
    """Half-precision weights under `state_dict`, as HPSv2 publishes them, and the description in open_clip's format."""
    weights = {name: tensor.half() for name, tensor in network.state_dict().items()}
    stored = io.BytesIO()  # torch's own error of a full disk does not say so
    torch.save({"state_dict": weights}, stored)
    _write_compressed(stored, directory / "preference.pt")
    (directory / "preference.json").write_text(json.dumps(world.preference, indent=2) + "\n")


def _write_compressed(stored: io.BytesIO, file: Path) -> None:
    """Deflate what torch.save stores as it is, and torch.load reads either way: most of the tokens' table is zeros."""
    with zipfile.ZipFile(stored) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():  # of no date, so that equal weights are equal files
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


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
    axis = torch.linspace(-1, 1, first.shape[-1])
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
