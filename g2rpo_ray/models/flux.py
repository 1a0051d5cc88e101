"""A diffusers FLUX pipeline as a flow model: prompt -> embedding, (latent, sigma) -> velocity, latent -> image.

Shapes: N latents, K prompts, L latent tokens of D channels (2 x 2 patches of the VAE's latent, packed), S text tokens.
Weights and their arithmetic have the dtype of the configuration; latents, sigmas and velocities are float32 outside.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.files import resolve
from g2rpo_ray.types import PromptEmbedding

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
ALL_PARTS = ("transformer", "vae", "scheduler", *TEXT_PARTS)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """K prompts on the model's device, in the model's dtype."""

    pooled: Tensor  # [K, D_pooled], CLIP
    sequence: Tensor  # [K, S, D_text], T5


class FluxModel:
    """A diffusers FLUX pipeline as a flow model. Made by `load`."""

    transformer: Any  # FluxTransformer2DModel, whose methods diffusers' lazy imports hide from type checkers
    """The velocity network; a wrapper with the same call may take its place. None where `load` was not asked for it."""
    latent_shape: tuple[int, int]
    """(L, D) of a packed latent."""

    def __init__(self, config: ModelConfig, device: str, pipeline: Any, channels: int, scale: int) -> None:
        """`channels`: D, what the transformer takes. `scale`: pixels to a VAE latent, along an edge."""
        self.transformer = pipeline.transformer
        self._pipeline = pipeline
        self._config = config
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._scale = scale
        rows, columns = config.height // (2 * scale), config.width // (2 * scale)
        self.latent_shape = (rows * columns, channels)
        # float32 whatever the dtype of the model: positions above 256 are not whole numbers in bfloat16
        self._image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
        self._guided = bool(self.transformer is not None and self.transformer.config.guidance_embeds)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        device: str,
        *,
        vae: bool = False,
        transformer: bool = False,
        text_encoders: bool = False,
    ) -> "FluxModel":
        """Load the parts asked for, frozen, in `config.dtype`, onto `device`; none: only check the settings.

        Raises:
            ValueError: one line that names the key (`model.path`, `model.height` ...), what was given and what to do.
        """
        parts = [name for name, wanted in (("vae", vae), ("transformer", transformer)) if wanted]
        parts += TEXT_PARTS if text_encoders else ()
        with _loading(config):
            channels, scale = _geometry(config)
        _check_size(config, 2 * scale)
        with _loading(config):
            pipeline = _load_parts(config, parts)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        if transformer and config.attention_backend is not None:
            _set_attention_backend(pipeline.transformer, config.attention_backend)
        return cls(config, device, pipeline.to(device), channels, scale)

    @property
    def image_tokens(self) -> int:
        """L, what FLUX's resolution-dependent shift depends on."""
        return self.latent_shape[0]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        """The prompts' embeddings, one forward pass each: a result must not depend on what else is encoded."""
        return [self._encode_one(prompt) for prompt in prompts]

    def _encode_one(self, prompt: str) -> PromptEmbedding:
        sequence, pooled, _ = self._pipeline.encode_prompt(
            prompt, device=self._device, max_sequence_length=self._config.max_sequence_length
        )
        pooled, sequence = pooled[0].to(self._dtype), sequence[0].to(self._dtype)
        return PromptEmbedding(prompt, _to_array(pooled), _to_array(sequence), self._config.dtype)

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal [L, D], float32, drawn on the CPU: the same bits for a model on any device."""
        rows, columns = (size // self._scale for size in (self._config.height, self._config.width))
        channels = self.latent_shape[1] // 4
        noise = torch.randn(1, channels, rows, columns, generator=generator)
        packed: Tensor = FluxPipeline._pack_latents(noise, 1, channels, rows, columns)
        return packed[0]

    def condition(self, embeddings: Sequence[PromptEmbedding]) -> Conditioning:
        """K embeddings as the transformer takes them."""
        pooled = torch.stack([_to_tensor(embedding.pooled, embedding.dtype) for embedding in embeddings])
        sequence = torch.stack([_to_tensor(embedding.sequence, embedding.dtype) for embedding in embeddings])
        return Conditioning(pooled.to(self._device, self._dtype), sequence.to(self._device, self._dtype))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """v(x, sigma, prompt), [N, L, D] float32 on the model's device; differentiable in the LoRA.

        `x` is [N, L, D], `sigma` [N], both float32 on that device; K prompts, either N or one for all. Diffusers
        multiplies the timestep by 1000 itself and casts it to the model's dtype: sigma is passed as it is.
        """
        n = len(x)
        guidance = torch.full((n,), self._config.guidance_scale, device=x.device) if self._guided else None
        velocity: Tensor = self.transformer(
            hidden_states=x.to(self._dtype),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=conditioning.pooled.expand(n, -1),
            encoder_hidden_states=conditioning.sequence.expand(n, -1, -1),
            txt_ids=torch.zeros(conditioning.sequence.shape[1], 3, device=x.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return velocity.float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images [N, H, W, 3] uint8 on the model's device, of latents [N, L, D] float32, in one pass of the VAE.

        At 720 px that takes gigabytes an image: the caller decides how many go together.
        """
        vae = self._pipeline.vae
        latent = FluxPipeline._unpack_latents(x, self._config.height, self._config.width, self._scale)
        latent = latent / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(latent.to(self._device, self._dtype), return_dict=False)[0]
        unit: Tensor = self._pipeline.image_processor.postprocess(image.float(), output_type="pt")  # [N, 3, H, W] 0..1
        return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _geometry(config: ModelConfig) -> tuple[int, int]:
    """Channels of a packed latent, and pixels to one VAE latent along an edge."""
    path, revision = resolve(config.path), config.revision
    if Path(path).is_absolute() and not Path(path).is_dir():  # diffusers would speak of the hub
        raise ValueError("there is no such directory")
    kind = FluxPipeline.load_config(path, revision=revision).get("_class_name")
    if kind != "FluxPipeline":
        raise ValueError(f"it holds a {kind}")
    transformer = FluxTransformer2DModel.load_config(path, subfolder="transformer", revision=revision)
    vae = AutoencoderKL.load_config(path, subfolder="vae", revision=revision)
    return transformer["in_channels"], 2 ** (len(vae["block_out_channels"]) - 1)


def _load_parts(config: ModelConfig, parts: Sequence[str]) -> Any:
    """A FluxPipeline with these parts, and None for the others."""
    path = resolve(config.path)
    for part in parts:  # without its folder diffusers would look for the part beside model_index.json
        if Path(path).is_dir() and not (Path(path) / part).is_dir():
            raise ValueError(f"it has no folder {part}")
    others = {part: None for part in ALL_PARTS if part not in parts}
    dtype = getattr(torch, config.dtype)
    return FluxPipeline.from_pretrained(path, revision=config.revision, dtype=dtype, **others)


def _check_size(config: ModelConfig, multiple: int) -> None:
    for key, size in (("height", config.height), ("width", config.width)):
        if size % multiple:
            below = max(multiple, size - size % multiple)
            raise ValueError(
                f"model.{key}: {size} given; must be a multiple of {multiple} for this pipeline, "
                f"e.g. {below} or {below + multiple}"
            )


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """Turns what diffusers, transformers and the hub raise into one line for the user."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        given = f"{config.path!r}" + (f" at revision {config.revision!r}" if config.revision else "")
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(
            f"model.path: cannot load {given}; expected a diffusers FluxPipeline, a directory with model_index.json "
            "and a folder for each part, or the id of one on the Hugging Face hub: check the path, or download it "
            f"where the hub can be reached and give that directory ({reason})"
        ) from None


def _set_attention_backend(transformer: Any, backend: str) -> None:
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"model.attention_backend: {backend!r} given; not usable here: {reason}") from None


def _to_array(tensor: Tensor) -> NDArray[Any]:
    """The bits of a tensor on the CPU: bfloat16, which numpy does not know, as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def _to_tensor(array: NDArray[Any], dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.array(array))  # a copy: what Ray hands out cannot be written to, and torch warns
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
