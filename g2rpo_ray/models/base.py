"""What a flow model is: prompt -> embedding, (latent, sigma) -> velocity, latent -> image. A family of models a file.

Shapes: N latents, K prompts; a latent [...] as the pipeline's own loop holds it, [L, D] packed tokens, [C, h, w], or
[C, F, h, w] of a video.
Weights and their arithmetic have the dtype of the configuration; latents, sigmas and velocities are float32 outside.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL.Image import Image
from torch import Tensor

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.imports import imported
from g2rpo_ray.messages import shown
from g2rpo_ray.models.conditioning import Conditioning, expanded, on_device
from g2rpo_ray.models.pipeline import (
    Description,
    check_frames,
    check_size,
    describe_pipeline,
    load_parts,
    set_attention_backend,
)
from g2rpo_ray.models.tokens import count_tokens, cut_message
from g2rpo_ray.types import PromptEmbedding, StoredTensor, sources_of, text_of

FAMILIES = {
    "FluxPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2_klein",
    "FluxKontextPipeline": "flux_kontext",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
    "QwenImage21Pipeline": "qwen_image_21",
    "ChromaPipeline": "chroma",
    "Lumina2Pipeline": "lumina2",
    "WanPipeline": "wan",
}
"""Module of each pipeline class, in this package; its `Model` is the adapter."""

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
UNCUT_TOKENS = 512  # that estimates take a prompt to have where a pipeline reads all of it


class FlowModel:
    """A diffusers pipeline as a flow model. Made by `load`, which knows the family by the pipeline's class."""

    pipeline_class: ClassVar[Any]
    transformer_class: ClassVar[Any] = ()
    vae_class: ClassVar[Any]
    arguments: ClassVar[tuple[tuple[str, str], ...]]
    """Tensors of an embedding, by the names of the pipeline's own arguments, and what the transformer calls them."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Parts without which the pipeline works, too: null in its `model_index.json`."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION + TEXT_ATTENTION
    """Name endings of the linear layers that get an adapter where `lora.targets` is unset."""
    lora_idle: ClassVar[tuple[str, ...]] = ()
    """Those of them that have no effect, so no gradient, in the last of `transformer_blocks`."""
    once: ClassVar[tuple[str, ...]] = ()
    """Modules whose input is the same in every call while one prompt is sampled without guidance."""
    once_a_row: ClassVar[tuple[str, ...]] = ()
    """The same, of modules whose input has a row a latent."""
    scale_name: ClassVar[str] = "guidance_scale"
    """What the pipeline calls the scale of its guidance."""
    template_tokens: ClassVar[int] = 0
    """Tokens around a prompt that are not in its embedding."""
    least_scale: ClassVar[float] = 1.0
    """Above it the pipeline guides by a negative prompt."""
    sources: ClassVar[tuple[int, int]] = (0, 0)
    """Least and most source pictures of a prompt: see `editing.EditingModel`."""

    _by_transformer: ClassVar[dict[Any, "type[FlowModel]"]] = {}

    collective = False
    """Whether a call of the transformer is a collective, as under ZeRO 3: all ranks make as many for as many rows."""
    transformer: Any
    """The velocity network; a wrapper with the same call may take its place. None where `load` was not asked for it."""
    latent_shape: tuple[int, ...]

    def __init__(self, config: ModelConfig, device: str, pipeline: Any, description: Description) -> None:
        self.transformer = pipeline.transformer
        self.network, self.autoencoder = description.network, description.autoencoder
        self._pipeline, self._config, self._device = pipeline, config, device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._scale = self.vae_scale(description.autoencoder)
        self.rows, self.columns = config.height // self._scale, config.width // self._scale  # of the VAE's latent
        defaults = inspect.signature(self.pipeline_class.__call__).parameters
        limit = defaults.get("max_sequence_length")
        self.text_tokens: int = config.max_sequence_length or (UNCUT_TOKENS if limit is None else limit.default)
        scale = config.guidance_scale
        self.guidance_scale: float = defaults[self.scale_name].default if scale is None else scale
        self._check_guidance()
        self._check_sources()
        self._counts, self._cut = count_tokens(pipeline), dict[str, tuple[int, int]]()
        with torch.device("meta"):
            self.latent_shape = tuple(self._pack(torch.empty(self._noise_shape())).shape[1:])

    def __init_subclass__(cls) -> None:
        FlowModel._by_transformer.setdefault(cls.transformer_class, cls)

    @staticmethod
    def load(
        config: ModelConfig,
        device: str,
        *,
        vae: bool = False,
        transformer: bool = False,
        text_encoders: bool = False,
        weights_on: str | None = None,
    ) -> "FlowModel":
        """Load the parts asked for, frozen, in `config.dtype`, onto `device`; none: only check the settings.

        Args:
            weights_on: another device, from which the caller moves the weights to `device`.

        Raises:
            ValueError: one line that names the key (`model.path`, `model.height` ...), what was given and what to do.
        """
        family, description = describe_model(config)
        check_size(config, 2 * family.vae_scale(description.autoencoder))
        check_frames(config, family.vae_frames(description.autoencoder), description.kind)
        parts = [name for name, wanted in (("vae", vae), ("transformer", transformer)) if wanted]
        parts += description.text_parts if text_encoders else ()
        parts += ["vae"] if text_encoders and config.sources and not vae else []  # it encodes the sources
        pipeline = load_parts(family.pipeline_class, config, description, parts, family.optional_parts)
        if transformer and config.attention_backend is not None:
            set_attention_backend(pipeline.transformer, config.attention_backend)
        return family(config, device, pipeline.to(weights_on or device), description)

    @classmethod
    def skeleton(cls, config: ModelConfig, device: str = "meta") -> "FlowModel":
        """The model from its configuration files alone: on the meta device shapes, on another one random weights."""
        model, default = cls.load(config, device), torch.get_default_dtype()
        torch.set_default_dtype(model._dtype)  # large models have no room for float32 on their way
        try:
            with torch.device(device):
                model.transformer = model.transformer_class.from_config(model.network)
                model._pipeline.vae = model.vae_class.from_config(model.autoencoder)
        finally:
            torch.set_default_dtype(default)
        for part in (model.transformer, model._pipeline.vae):
            torch.nn.Module.to(part, model._dtype).requires_grad_(False).eval()  # diffusers' own warns
        if device == "meta":
            model._read_no_data()
        elif config.attention_backend is not None:
            set_attention_backend(model.transformer, config.attention_backend)
        return model

    @property
    def decoder(self) -> torch.nn.Module:
        """What `decode` needs the weights of."""
        decoder: torch.nn.Module = self._pipeline.vae.decoder
        return decoder

    @staticmethod
    def vae_scale(autoencoder: Mapping[str, Any]) -> int:
        """Pixels to one VAE latent, along an edge."""
        return 2 ** (len(autoencoder["block_out_channels"]) - 1)

    @staticmethod
    def vae_frames(autoencoder: Mapping[str, Any]) -> int | None:
        """Frames to one VAE latent, after the first frame, which has one of its own; None: pictures alone."""
        return None

    @property
    def image_tokens(self) -> int:
        """What resolution-dependent shifts depend on: 2 x 2 patches of the VAE's latent."""
        return self.rows * self.columns // 4

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], sources: Mapping[str, Sequence[Image]] = MappingProxyType({}), *,
        negative: bool = False,
    ) -> list[PromptEmbedding]:  # fmt: skip
        """The prompts' embeddings, one forward pass each: a result must not depend on what else is encoded.

        Args:
            sources: RGB pictures of the prompts, by `types.sources_of` them.

        Raises:
            ValueError: one line; the pipeline cannot take so many sources, or of such a size.
        """
        return [self._embedding(prompt, negative, sources.get(sources_of(prompt), ())) for prompt in prompts]

    def take_cut_message(self) -> str:
        """One line about the prompts that `encode` has cut since the last call, with their lengths; "" if none."""
        cut, self._cut = self._cut, {}
        return cut_message(cut)

    def _embedding(self, prompt: str, negative: bool, sources: Sequence[Image]) -> PromptEmbedding:
        least, most = self.sources
        if not least <= len(sources) <= most:
            raise ValueError(
                f"model.sources: the prompt {shown(text_of(prompt))} has {len(sources)} source images; a "
                f"{self.pipeline_class.__name__} takes {least} to {most}"
            )
        tensors = self._encode(text_of(prompt), negative, **self._options(sources))
        tensors |= self._source_tensors(sources) if sources else {}
        if self._counts:
            tokens, kept = self._counts[-1]  # pipelines ask the encoder that reads most last
            tokens, kept = tokens - self.template_tokens, min(kept - self.template_tokens, self.text_tokens)
            if tokens > kept:
                self._cut[prompt] = tokens, kept
        self._counts.clear()
        stored = {name: StoredTensor.of(self._in_dtype(tensor)) for name, tensor in tensors.items()}
        return PromptEmbedding(prompt, stored)

    def _in_dtype(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.transformer.enable_gradient_checkpointing()

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal [...], float32, drawn on the CPU: the same bits for a model on any device."""
        return self._pack(torch.randn(self._noise_shape(), generator=generator))[0]

    def condition(
        self,
        embeddings: Sequence[PromptEmbedding],
        negative: PromptEmbedding | Sequence[PromptEmbedding] | None = None,
    ) -> Conditioning:
        """K embeddings as the transformer takes them; `negative`: what to guide away from, if at all, one or K."""
        if negative is None:
            return Conditioning(self._arguments_of(embeddings))
        away = [negative] if isinstance(negative, PromptEmbedding) else negative
        return Conditioning(self._arguments_of(embeddings), self._arguments_of(away))

    def random_embedding(self, prompt: str, generator: torch.Generator) -> PromptEmbedding:
        """Noise of the shape and dtype of the longest prompt's embedding: to measure with."""
        shapes = self.stored_shapes().items()
        drawn = {name: torch.randn(shape, generator=generator, device="cpu").to(self._dtype) for name, shape in shapes}
        return PromptEmbedding(prompt, {name: StoredTensor.of(tensor) for name, tensor in drawn.items()})

    def _arguments_of(self, embeddings: Sequence[PromptEmbedding]) -> dict[str, Any]:
        names = embeddings[0].tensors
        columns = {name: [self._in_dtype(e.tensors[name].tensor()) for e in embeddings] for name in names}
        return {name: on_device(value, self._device) for name, value in self._collate(columns).items()}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dσ at (x, sigma, prompt), [N, ...] float32 on the model's device; differentiable in the LoRA.

        `x` is [N, ...], `sigma` [N], both float32 on that device; K prompts, either N or one for all.
        """
        v = self._predict(x, sigma, expanded(conditioning.prompt, len(x)))
        if conditioning.negative is None:
            return v
        return self._guide(v, self._predict(x, sigma, expanded(conditioning.negative, len(x))))

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images [N, H, W, 3], of videos [N, F, H, W, 3], uint8 on the model's device, of latents [N, ...] float32.

        In one pass of the VAE. At 720 px that takes gigabytes an image: the caller decides how many go together.
        """
        latent = self._to_vae(x).to(self._device, self._dtype)
        image = self._pipeline.vae.decode(latent, return_dict=False)[0]
        frames = image.movedim(2, 1) if image.ndim == 5 else image[:, None]  # [N, F, C, H, W]
        processor = getattr(self._pipeline, "image_processor", None) or self._pipeline.video_processor
        unit: Tensor = processor.postprocess(frames.flatten(0, 1).float(), output_type="pt")  # 0..1
        pixels = (self._rgb(unit) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])
        return pixels if self._config.frames > 1 else pixels[:, 0]

    def sigmas(self, steps: int) -> Tensor:
        """The pipeline's own noise levels [steps + 1], float32, from 1 to 0.

        Raises:
            ValueError: its scheduler is of another kind, or has no grid of so few steps.
        """
        scheduler: Any = self._pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"sampler.shift: pipeline given, but the pipeline's scheduler is a {type(scheduler).__name__}, which "
                "is not FlowMatchEulerDiscreteScheduler; give a number"
            )
        self._set_timesteps(scheduler, steps)
        grid: Tensor = scheduler.sigmas  # type: ignore[attr-defined]
        if not (grid.diff() < 0).all():
            raise ValueError(
                f"sampler.steps: {steps} given; too few for the pipeline's own grid; give more, or set sampler.shift"
            )
        return grid

    # What a family says otherwise.

    def _rgb(self, unit: Tensor) -> Tensor:
        """The VAE's pictures [N, C, H, W] in 0..1 as RGB."""
        return unit

    def _noise_shape(self) -> tuple[int, ...]:
        """Of the noise that the pipeline draws for one image."""
        return (1, self.network["in_channels"], self.rows, self.columns)

    def _pack(self, noise: Tensor) -> Tensor:
        """The latent that the pipeline's loop makes of it."""
        return noise

    def _to_vae(self, x: Tensor) -> Tensor:
        """Latents [N, ...] as the VAE decodes them."""
        vae = self._pipeline.vae.config
        return x / vae.scaling_factor + vae.shift_factor

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        """Tensors of one prompt, without a batch dimension, by the names of the pipeline's arguments."""
        raise NotImplementedError

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an embedding's tensors, for the longest prompt."""
        raise NotImplementedError

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same, and those of the sources."""
        return self.embedding_shapes()

    def _options(self, sources: Sequence[Image]) -> dict[str, Any]:
        """Of the pipeline's `encode_prompt`."""
        return {"device": self._device, "max_sequence_length": self.text_tokens}

    def _source_tensors(self, sources: Sequence[Image]) -> dict[str, Tensor]:
        """Tensors of an embedding by its sources, of which there is one at least."""
        raise NotImplementedError

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """The transformer's arguments, of K embeddings by name."""
        return {argument: torch.stack(list(columns[name])) for name, argument in self.arguments}

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the transformer beside latents, time and prompt."""
        return {}

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        """One evaluation of the transformer, as dx/dσ in float32. It casts the time itself: sigma is not rounded."""
        others = self._others(len(x), text)
        named = {name: value for name, value in text.items() if not name.startswith("source_")}
        output: Tensor = self.transformer(
            hidden_states=x.to(self._dtype), timestep=sigma, **named, **others, return_dict=False
        )[0]
        return output.float()

    def _guide(self, v: Tensor, unguided: Tensor) -> Tensor:
        """Classifier-free guidance, by the velocities of prompt and negative prompt."""
        return unguided + self.guidance_scale * (v - unguided)

    def _read_no_data(self) -> None:
        """Give the transformer what it would read of its arguments' data, which is not there on the meta device."""

    def _guides(self) -> bool:
        """Whether the pipeline has classifier-free guidance."""
        return True

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self._mu(steps))

    def _mu(self, steps: int) -> float:
        """Of the scheduler's dynamic shift, if it has one."""
        given = self._pipeline.scheduler.config
        ends = given.base_image_seq_len, given.max_image_seq_len, given.base_shift, given.max_shift
        return float(calculate_shift(self.image_tokens, *ends))

    def _check_sources(self) -> None:
        given, (least, most) = self._config.sources, self.sources
        if not least <= given <= most:
            raise ValueError(
                f"model.sources: {given} given; a {self.pipeline_class.__name__} takes {least} to {most} source "
                "images per prompt"
            )

    def _check_guidance(self) -> None:
        negative, kind = self._config.negative_prompt, self.pipeline_class.__name__
        if negative is None:
            return
        if not self._guides():
            raise ValueError(
                f"model.negative_prompt: {negative!r} given, but this {kind} is distilled and has no classifier-free "
                "guidance; remove it"
            )
        if self.guidance_scale <= self.least_scale:
            raise ValueError(
                f"model.guidance_scale: {self.guidance_scale:g} given; with model.negative_prompt a {kind} needs more "
                f"than {self.least_scale:g}; to disable guidance, remove model.negative_prompt"
            )


def describe_model(config: ModelConfig) -> tuple[type[FlowModel], Description]:
    """The family of a pipeline, and what its configuration files say.

    Raises:
        ValueError: one line; there is no pipeline of a known family.
    """
    own = imported(config.family) if config.family else None
    if own is not None and not (isinstance(own, type) and issubclass(own, FlowModel)):
        raise ValueError(f"model.family: {config.family} given, which is not a subclass of g2rpo_ray.models.FlowModel")
    description = describe_pipeline(config, (own.pipeline_class.__name__,) if own else tuple(FAMILIES))
    family = own or importlib.import_module(f"{__package__}.{FAMILIES[description.kind]}").Model
    FlowModel._by_transformer[family.transformer_class] = family  # others may have the same transformer
    return family, description


def family_of(transformer: Any) -> type[FlowModel]:
    """The family that a transformer belongs to, which was loaded as one."""
    return FlowModel._by_transformer[type(transformer)]
