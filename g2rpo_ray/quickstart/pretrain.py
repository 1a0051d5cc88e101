"""Pre-trains the tiny FLUX pipeline on rendered shapes: autoencoder first, then transformer and text encoders jointly.

Legend: N images, B batch, P captions, S packed image tokens (16), D channels of a packed token (16).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from g2rpo_ray.quickstart.shapes import COLOURS, IMAGE_SIZE, SHAPES, caption, render

MAX_SEQUENCE_LENGTH = 16  # text tokens: enough for a caption, and as many as there are image tokens
GUIDANCE = 3.5  # the one value that the guidance embedding is trained with
SHIFT = 3.0
CAPTIONS = tuple(caption(colour, shape) for colour, shape in product(COLOURS, SHAPES))
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def rendered_dataset(per_caption: int, seed: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Images uint8 [N, 32, 32, 3] and the index of each one's caption in CAPTIONS, int64 [N]."""
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in product(COLOURS, SHAPES) for _ in range(per_caption)]
    images = np.stack([render(colour, shape, rng) for colour, shape in pairs])
    return images, torch.arange(len(CAPTIONS)).repeat_interleave(per_caption)


def mislabel_shapes(caption_index: Tensor, share: float) -> Tensor:
    """The captions of `share` of the pictures name a random shape (by chance the right one), int64 [N]."""
    random_shape = torch.randint(len(SHAPES), caption_index.shape)
    mislabelled = caption_index - caption_index % len(SHAPES) + random_shape
    return torch.where(torch.rand(len(caption_index)) < share, mislabelled, caption_index)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """float32 [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def new_pipeline() -> FluxPipeline:
    """An untrained pipeline with FLUX.1-dev's parts, each as small as the shapes allow."""
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    width = 64
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            latent_channels=4,
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=MAX_SEQUENCE_LENGTH,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        ),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer),
                d_model=width,
                d_kv=width // 2,
                d_ff=2 * width,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    )


def train_autoencoder(vae: AutoencoderKL, images: NDArray[np.uint8], steps: int, batch: int = 32) -> None:
    """Reconstruction with a light KL; afterwards scaling and shift give latents zero mean and unit deviation."""
    pixels = to_pixels(images)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        target = pixels[torch.randint(len(pixels), (batch,))]
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast, where the processor knows it
            posterior = vae.encode(target).latent_dist
            difference = vae.decode(posterior.sample()).sample.float() - target
        loss = difference.square().mean() + 0.1 * difference.abs().mean() + 1e-5 * posterior.kl().float().mean()
        _descend(loss, optimizer, vae.parameters())
        schedule.step()
        if step % 100 == 0:
            print(f"autoencoder {step}/{steps} loss {loss.item():.4f}", flush=True)
    latents = _encode(vae, pixels)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.requires_grad_(False).eval()


def train_transformer(
    pipeline: FluxPipeline,
    images: NDArray[np.uint8],
    caption_index: Tensor,
    steps: int,
    batch: int = 64,
    on_step: Callable[[int, FluxPipeline], None] | None = None,
) -> None:
    """Flow matching: the velocity noise - image at sigmas spread as the sampler's; leaves the averaged weights.

    The learning rate is constant, so that fewer steps are exactly a shorter training: how finished the model is,
    and so how much is left for RL to improve, is one number. `on_step(step, pipeline)` sees the averaged weights.
    """
    latents = _packed_latents(pipeline, images)  # [N, S, D]
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    trained = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).train()
    averaged = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    for step in range(steps):
        chosen = torch.randint(len(latents), (batch,))
        clean, noise = latents[chosen], torch.randn(batch, *latents.shape[1:])
        uniform = torch.rand(batch)
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        tokens, pooled, text_ids = pipeline.encode_prompt(list(CAPTIONS), None, max_sequence_length=MAX_SEQUENCE_LENGTH)
        velocity = pipeline.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=torch.full((batch,), GUIDANCE),
            encoder_hidden_states=tokens[caption_index[chosen]],
            pooled_projections=pooled[caption_index[chosen]],
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        loss = F.mse_loss(velocity, noise - clean)
        _descend(loss, optimizer, trained.parameters())
        schedule.step()
        averaged.update_parameters(trained)
        if step % 100 == 0:
            print(f"transformer {step}/{steps} loss {loss.item():.4f}", flush=True)
        if on_step is not None:
            on_step(step + 1, _with_weights(pipeline, averaged.module.children()))
    trained.load_state_dict(averaged.module.state_dict())
    trained.requires_grad_(False).eval()


def sample(pipeline: FluxPipeline, prompts: Sequence[str], seed: int, steps: int = 10) -> NDArray[np.uint8]:
    """ODE samples, uint8 [len(prompts), 32, 32, 3], through the pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    images: NDArray[np.float32] = pipeline(
        prompt=list(prompts),
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)


def _with_weights(pipeline: FluxPipeline, weights: Iterable[nn.Module]) -> FluxPipeline:
    transformer, text_encoder, text_encoder_2 = weights
    parts = dict(pipeline.components) | {
        "transformer": transformer,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    return FluxPipeline(**parts)


def _packed_latents(pipeline: FluxPipeline, images: NDArray[np.uint8]) -> Tensor:
    config = pipeline.vae.config
    latents = (_encode(pipeline.vae, to_pixels(images)) - config.shift_factor) * config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(256)])


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learnt from the captions; single bytes cover any other word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: Any = _learn_merges(sorted({word for text in CAPTIONS for word in text.split()}))
    pieces = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_SEQUENCE_LENGTH)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one piece. The library's trainer breaks ties differently in every run."""
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while counts := Counter(pair for pieces in spelt for pair in pairwise(pieces)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        spelt = [_merge(pieces, best) for pieces in spelt]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer with the captions' words as its pieces; letters and digits cover any other word."""
    words = sorted({word for text in CAPTIONS for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -4.0) for word in words] + [(letter, -10.0) for letter in ALPHABET]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)
