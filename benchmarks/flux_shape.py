"""FLUX.1-dev's shape with random weights, and what one evaluation of it takes, counted without a device."""

from typing import Any

from common import Row

import torch  # isort: skip  # common makes the packages importable
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from g2rpo_ray.config import LoraConfig, ModelConfig
from g2rpo_ray.models import FlowModel, add_lora
from g2rpo_ray.models.estimate import one_velocity, operations, peak_bytes
from g2rpo_ray.models.flux import Model as FluxModel
from g2rpo_ray.models.pipeline import Description


def flux_model(config: ModelConfig, device: str) -> FluxModel:
    """FLUX.1-dev's shape, random weights."""
    torch.set_default_dtype(getattr(torch, config.dtype))
    with torch.device(device):
        transformer: Any = FluxTransformer2DModel(guidance_embeds=True)
        vae = flux_vae()
    torch.set_default_dtype(torch.float32)
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    transformer.requires_grad_(False).eval()
    vae.requires_grad_(False).eval()
    return FluxModel(config, device, pipeline, Description("FluxPipeline", (), transformer.config, vae.config))


def flux_vae() -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def counted(model: FlowModel, n: int) -> tuple[float, int]:
    """Operations of one evaluation of n latents, and the peak of its tensors."""
    with torch.device("meta"), torch.inference_mode():
        velocity = one_velocity(model, n)
        return 1e12 * operations(velocity), peak_bytes(velocity)


def count_flux() -> list[Row]:
    model = flux_model(ModelConfig(path="flux", dtype="bfloat16", height=720, width=720), "meta")
    weights = 2 * sum(parameter.numel() for parameter in model.transformer.parameters())
    rows = [_counted(f"velocity, batch {n}", *counted(model, n), weights) for n in (1, 12)]
    add_lora(model.transformer, LoraConfig(), 0)
    lora = weights + sum(4 * p.numel() for p in model.transformer.parameters() if p.requires_grad)
    rows.append(_counted("velocity, batch 12, LoRA 64", *counted(model, 12), lora))
    with torch.inference_mode(), torch.device("meta"):
        latent = torch.empty(1, *model.latent_shape)
        with FlopCounterMode(display=False) as counter:
            model.decode(latent)
        peak = peak_bytes(lambda: model.decode(latent))
    parameters = 2 * sum(parameter.numel() for parameter in model.decoder.parameters())
    rows.append(_counted("decode, one image", float(counter.get_total_flops()), peak, parameters))
    return rows


def _counted(what: str, flops: float, peak: int, weights: int) -> Row:
    return {
        "FLUX, 720 px, bfloat16": what,
        "TFLOP": flops / 1e12,
        "weights GB": weights / 1e9,
        "tensors GB": peak / 1e9,
    }
