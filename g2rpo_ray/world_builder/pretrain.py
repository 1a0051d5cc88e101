"""Pre-trains a world's pipeline: autoencoder first, then transformer and text encoders jointly.

Legend: N images or videos, B batch, S packed image tokens, D channels of a packed token.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from g2rpo_ray.world_builder.pipeline import GUIDANCE, SHIFT, to_pixels
from g2rpo_ray.world_builder.world import Pictures, World

EMBEDDING = re.compile("embed|shared")  # of tokens, pixels and time: no matrices between features


def train_autoencoder(world: World, vae: AutoencoderKL, images: Pictures) -> Tensor:
    """Reconstruction with a light KL; afterwards scaling and shift give latents zero mean and unit deviation.

    Returns the latents of `images`, packed, [N, S, D].
    """
    fit_autoencoder(vae, images, world.autoencoder_steps, world.autoencoder_batch, world.autoencoder_kl)
    pixels = to_pixels(images)
    latents = _encode(vae, pixels)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.requires_grad_(False).eval()
    latents = (_encode(vae, pixels) - shift) * scale  # other last bits than with gradients
    return FluxPipeline._pack_latents(latents, *latents.shape)


def fit_autoencoder(vae: Any, images: Pictures, steps: int, batch: int, kl: float) -> None:
    """Reconstruction of images or videos, and `kl` times the divergence from normal latents, summed over a picture's.

    `images`: uint8 [N, H, W, 3] or [N, F, H, W, 3].
    """
    pixels = to_pixels(images)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        target = pixels[torch.randint(len(pixels), (batch,))]
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast, where the processor knows it
            posterior = vae.encode(target).latent_dist
            difference = vae.decode(posterior.sample()).sample.float() - target
        loss = difference.square().mean() + 0.1 * difference.abs().mean() + kl * posterior.kl().float().mean()
        descend(loss, [optimizer], vae.parameters())
        schedule.step()
        if step % 100 == 0:
            print(f"autoencoder {step}/{steps} loss {loss.item():.4f}", flush=True)


def train_transformer(
    world: World,
    pipeline: FluxPipeline,
    latents: Tensor,
    caption_index: Tensor,
    on_step: Callable[[int, FluxPipeline], bool],
) -> None:
    """Flow matching on packed latents [N, S, D]; `on_step(step, pipeline)`: see `fit_transformer`."""
    side = math.isqrt(latents.shape[1])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    trained = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (world.transformer_batch,))
        noisy, sigma, target = noised(latents[chosen])
        captions, rows = _captions(world, caption_index[chosen])
        with faster(world.mixed_precision):
            tokens, pooled, text_ids = pipeline.encode_prompt(captions, None, max_sequence_length=world.tokens)
            velocity = pipeline.transformer(
                hidden_states=noisy,
                timestep=sigma,
                guidance=torch.full((len(chosen),), GUIDANCE),
                encoder_hidden_states=tokens[rows],
                pooled_projections=pooled[rows],
                txt_ids=text_ids,
                img_ids=image_ids,
            ).sample
        return F.mse_loss(velocity.float(), target)

    def looked(step: int, averaged: nn.Module) -> bool:
        return on_step(step, _with_weights(pipeline, averaged.children()))

    fit_transformer(trained, world.transformer_steps, loss, world.muon, looked)


def noised(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents [B, ...] at noise levels [B] spread as the sampler's, and their velocity noise - clean."""
    noise, uniform = torch.randn(clean.shape), torch.rand(len(clean))
    sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    return torch.lerp(clean, noise, sigma.view(-1, *[1] * (clean.ndim - 1))), sigma, noise - clean


def fit_transformer(
    trained: nn.Module,
    steps: int,
    loss_of_batch: Callable[[], Tensor],
    muon: bool = True,
    on_step: Callable[[int, nn.Module], bool] = lambda step, averaged: False,
) -> None:
    """Descends a loss of random batches and leaves the averaged weights, frozen.

    The learning rate is constant, so that fewer steps are exactly a shorter training: how finished the model is, and so
    how much is left for RL to improve, is one number. `on_step(step, averaged)` says whether it is the last step.
    """
    trained.train()
    averaged = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizers = new_optimizers(trained, muon, lr=1e-3)
    schedules = [LambdaLR(one, lambda step: min(1.0, (step + 1) / 100)) for one in optimizers]
    for step in range(steps):
        loss = loss_of_batch()
        descend(loss, optimizers, trained.parameters())
        for schedule in schedules:
            schedule.step()
        averaged.update_parameters(trained)
        if step % 100 == 0:
            print(f"transformer {step}/{steps} loss {loss.item():.4f}", flush=True)
        if on_step(step + 1, averaged.module):
            break
    trained.load_state_dict(averaged.module.state_dict())
    trained.requires_grad_(False).eval()


def _captions(world: World, caption_index: Tensor) -> tuple[list[str], Tensor]:
    """The captions to encode for a batch and each picture's row among them: all of a world that has few."""
    if len(world.captions) <= len(caption_index):
        return list(world.captions), caption_index
    return [world.captions[at] for at in caption_index], torch.arange(len(caption_index))


def _with_weights(pipeline: FluxPipeline, weights: Iterable[nn.Module]) -> FluxPipeline:
    transformer, text_encoder, text_encoder_2 = weights
    parts = dict(pipeline.components) | {
        "transformer": transformer,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    return FluxPipeline(**parts)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(256)])


def new_optimizers(trained: nn.Module, muon: bool, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for matrices within layers, and AdamW for what remains: a lower loss after as many steps."""
    parameters = {name: one for name, one in trained.named_parameters() if one.requires_grad}
    matrices = [name for name, one in parameters.items() if muon and one.ndim == 2 and not EMBEDDING.search(name)]
    within = [parameters.pop(name) for name in matrices]
    others = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=1e-3)
    if not within:
        return [others]
    return [torch.optim.Muon(within, lr=lr, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"), others]


@contextmanager
def faster(mixed: bool) -> Iterator[None]:
    """Matrix products in bfloat16, and attention by them: the gradient of the fused one takes a third of a step."""
    if not mixed:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def descend(loss: Tensor, optimizers: Sequence[torch.optim.Optimizer], parameters: Iterable[Tensor]) -> None:
    """A step of each optimizer, gradients of at most norm 1."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
