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
    SECOND,
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
"""By pipeline class, the module of this package with the family's `Model`."""

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
UNCUT_TOKENS = 512  # assumed length of a prompt in estimates, for pipelines without a limit


class FlowModel:
    """A diffusers pipeline as a flow model. Made by `load`, which knows the family by the pipeline's class."""

    pipeline_class: ClassVar[Any]
    transformer_class: ClassVar[Any] = ()
    vae_class: ClassVar[Any]
    arguments: ClassVar[tuple[tuple[str, str], ...]]
    """Tensors of an embedding: name of the pipeline's argument, name of the transformer's argument."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Parts that may be null in the pipeline's `model_index.json`."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION + TEXT_ATTENTION
    """Suffixes of the linear layers that get an adapter if `lora.targets` is unset."""
    lora_idle: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the layers in the last of `transformer_blocks` without effect, and so without gradient."""
    once: ClassVar[tuple[str, ...]] = ()
    """Modules whose input is equal in every call while one prompt is sampled without guidance."""
    once_a_row: ClassVar[tuple[str, ...]] = ()
    """Like `once`, for modules whose input has one row per latent."""
    scale_name: ClassVar[str] = "guidance_scale"
    """Name of the pipeline's argument for the guidance scale."""
    template_tokens: ClassVar[int] = 0
    """Tokens around a prompt that are not in its embedding."""
    least_scale: ClassVar[float] = 1.0
    """The pipeline uses the negative prompt if the guidance scale is above this value."""
    sources: ClassVar[tuple[int, int]] = (0, 0)
    """Least and most source pictures of a prompt: see `editing.EditingModel`."""

    _by_transformer: ClassVar[dict[Any, "type[FlowModel]"]] = {}

    collective = False
    """True if a call of the transformer is a collective, as with ZeRO 3: all ranks need equal calls of equal rows."""
    transformer: Any
    """The velocity network, or a wrapper of it. None if `load` did not load it."""
    low_noise: Any = None
    """A second, frozen network of the same shape, which evaluates noise levels below `lora_from`."""
    latent_shape: tuple[int, ...]

    def __init__(self, config: ModelConfig, device: str, pipeline: Any, description: Description) -> None:
        self.transformer = pipeline.transformer
        self.network, self.autoencoder = description.network, description.autoencoder
        self._pipeline, self._config = pipeline, config
        self.device = device
        """Of the inputs and results of its methods."""
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
        low_noise: bool = True,
        weights_on: str | None = None,
    ) -> "FlowModel":
        """Loads parts of a pipeline, frozen, in `config.dtype`. Without any part it only checks the settings.

        Args:
            config: section `model`.
            device: of the weights.
            vae, transformer, text_encoders: parts to load.
            low_noise: with `transformer`, also load the second one of a pipeline with two.
            weights_on: another device, from which the caller moves the weights to `device`.

        Raises:
            ValueError: one line with the key (`model.path`, `model.height` ...), the given value and what to do.
        """
        family, description = describe_model(config)
        check_size(config, 2 * family.vae_scale(description.autoencoder))
        check_frames(config, family.vae_frames(description.autoencoder), description.kind)
        parts = [name for name, wanted in (("vae", vae), ("transformer", transformer)) if wanted]
        parts += [SECOND] if transformer and low_noise and SECOND in description.parts else []
        parts += description.text_parts if text_encoders else ()
        parts += ["vae"] if text_encoders and config.sources and not vae else []  # it encodes the sources
        pipeline = load_parts(family.pipeline_class, config, description, parts, family.optional_parts)
        if transformer and config.attention_backend is not None:
            for network in filter(None, (pipeline.transformer, getattr(pipeline, SECOND, None))):
                set_attention_backend(network, config.attention_backend)
        return family(config, device, pipeline.to(weights_on or device), description)

    @classmethod
    def skeleton(cls, config: ModelConfig, device: str = "meta") -> "FlowModel":
        """The model from its configuration files only: shapes on the meta device, random weights on another one."""
        model, default = cls.load(config, device), torch.get_default_dtype()
        torch.set_default_dtype(model._dtype)  # large models may not fit in float32
        try:
            with torch.device(device):
                model.transformer = model.transformer_class.from_config(model.network)
                if model.lora_from:
                    model.low_noise = model.transformer_class.from_config(model.network)
                model._pipeline.vae = model.vae_class.from_config(model.autoencoder)
        finally:
            torch.set_default_dtype(default)
        for part in filter(None, (model.transformer, model.low_noise, model._pipeline.vae)):
            torch.nn.Module.to(part, model._dtype).requires_grad_(False).eval()  # diffusers' own warns
        if device != "meta" and config.attention_backend is not None:
            for network in filter(None, (model.transformer, model.low_noise)):
                set_attention_backend(network, config.attention_backend)
        return model

    def move(self, device: str) -> None:
        """Moves the loaded networks."""
        for part in filter(None, (self.transformer, self.low_noise, self._pipeline.vae)):
            torch.nn.Module.to(part, device)  # diffusers' own warns

    @property
    def lora_from(self) -> float:
        """The lowest noise level at which the network with the LoRA is evaluated."""
        return 0.0

    @property
    def decoder(self) -> torch.nn.Module:
        """The VAE's decoder, whose weights `decode` needs."""
        decoder: torch.nn.Module = self._pipeline.vae.decoder
        return decoder

    @staticmethod
    def vae_scale(autoencoder: Mapping[str, Any]) -> int:
        """Pixels per VAE latent along a side."""
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
        """The prompts' embeddings, one forward pass each, so that a result does not depend on other prompts.

        Args:
            prompts: names of prompts.
            sources: RGB images of the prompts, by `types.sources_of`.
            negative: encode them as negative prompts.

        Raises:
            ValueError: one line; the pipeline cannot take so many sources, or of such a size.
        """
        return [self._embedding(prompt, negative, sources.get(sources_of(prompt), ())) for prompt in prompts]

    def take_cut_message(self) -> str:
        """One line about the prompts that `encode` truncated since the last call, with their lengths; "" if none."""
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
        """Recomputes the blocks' activations in the backward pass."""
        self.transformer.enable_gradient_checkpointing()

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal [...], float32, drawn on the CPU, so that the bits do not depend on the device."""
        return self._pack(torch.randn(self._noise_shape(), generator=generator))[0]

    def condition(
        self,
        embeddings: Sequence[PromptEmbedding],
        negative: PromptEmbedding | Sequence[PromptEmbedding] | None = None,
    ) -> Conditioning:
        """The transformer's inputs of K embeddings; `negative`, one or K embeddings, enables guidance."""
        if negative is None:
            return Conditioning(self._arguments_of(embeddings))
        away = [negative] if isinstance(negative, PromptEmbedding) else negative
        return Conditioning(self._arguments_of(embeddings), self._arguments_of(away))

    def random_embedding(self, prompt: str, generator: torch.Generator) -> PromptEmbedding:
        """Noise of the shape and dtype of the longest prompt's embedding, for measurements; a mask has no padding."""

        def draw(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.endswith("_mask"):
                return torch.ones(shape, dtype=torch.bool, device="cpu")
            return torch.randn(shape, generator=generator, device="cpu").to(self._dtype)

        drawn = {name: draw(name, shape) for name, shape in self.stored_shapes().items()}
        return PromptEmbedding(prompt, {name: StoredTensor.of(tensor) for name, tensor in drawn.items()})

    def _arguments_of(self, embeddings: Sequence[PromptEmbedding]) -> dict[str, Any]:
        names = embeddings[0].tensors
        columns = {name: [self._in_dtype(e.tensors[name].tensor()) for e in embeddings] for name in names}
        return {name: on_device(value, self.device) for name, value in self._collate(columns).items()}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dσ at (x, sigma, prompt), [N, ...] float32 on the model's device; differentiable in the LoRA.

        `x` is [N, ...], `sigma` [N], both float32 on that device; K prompts, either N or one for all.
        """
        v = self._predict(x, sigma, expanded(conditioning.prompt, len(x)))
        if conditioning.negative is None:
            return v
        return self._guide(v, self._predict(x, sigma, expanded(conditioning.negative, len(x))), sigma)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images [N, H, W, 3], of videos [N, F, H, W, 3], uint8 on the model's device, of latents [N, ...] float32.

        It is one pass of the VAE, which takes gigabytes per image at 720 px; the caller decides the batch.
        """
        latent = self._to_vae(x).to(self.device, self._dtype)
        image = self._pipeline.vae.decode(latent, return_dict=False)[0]
        frames = image.movedim(2, 1) if image.ndim == 5 else image[:, None]  # [N, F, C, H, W]
        processor = getattr(self._pipeline, "image_processor", None) or self._pipeline.video_processor
        unit: Tensor = processor.postprocess(frames.flatten(0, 1).float(), output_type="pt")  # 0..1
        pixels = (self._rgb(unit) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])
        return pixels if self._config.frames > 1 else pixels[:, 0]

    def sigmas(self, steps: int) -> Tensor:
        """The pipeline's own noise levels [steps + 1], float32, from 1 to 0.

        Raises:
            ValueError: the scheduler is of another kind, or the steps are too few for its grid.
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
        """The VAE's output [N, C, H, W] in 0..1 as RGB."""
        return unit

    def _noise_shape(self) -> tuple[int, ...]:
        """Shape of the pipeline's noise for one image."""
        return (1, self.network["in_channels"], self.rows, self.columns)

    def _pack(self, noise: Tensor) -> Tensor:
        """The latent in the form of the pipeline's loop."""
        return noise

    def _to_vae(self, x: Tensor) -> Tensor:
        """Latents [N, ...] in the form that the VAE decodes."""
        vae = self._pipeline.vae.config
        return x / vae.scaling_factor + vae.shift_factor

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        """Tensors of one prompt, without a batch dimension, by the names of the pipeline's arguments."""
        raise NotImplementedError

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an embedding's tensors, for the longest prompt."""
        raise NotImplementedError

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an embedding's tensors, with those of the sources."""
        return self.embedding_shapes()

    def _options(self, sources: Sequence[Image]) -> dict[str, Any]:
        """Options of the pipeline's `encode_prompt`."""
        return {"device": self.device, "max_sequence_length": self.text_tokens}

    def _source_tensors(self, sources: Sequence[Image]) -> dict[str, Tensor]:
        """Tensors of an embedding for one or more sources."""
        raise NotImplementedError

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """The transformer's arguments for K embeddings' tensors by name."""
        return {argument: torch.stack(list(columns[name])) for name, argument in self.arguments}

    def _others(self, n: int, text: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the transformer other than latents, time and prompt."""
        return {}

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        """One evaluation of the transformer, as dx/dσ in float32. Sigma is not rounded; the transformer casts it."""
        return self._output_of(self.transformer, x, sigma, text)

    def _output_of(self, network: Any, x: Tensor, time: Tensor, text: Mapping[str, Any]) -> Tensor:
        """The output of a network in float32; `time` is its argument."""
        others = self._others(len(x), text)
        named = {name: value for name, value in text.items() if not name.startswith("source_")}
        output: Tensor = network(hidden_states=x.to(self._dtype), timestep=time, **named, **others, return_dict=False)[
            0
        ]
        return output.float()

    def _guide(self, v: Tensor, unguided: Tensor, sigma: Tensor) -> Tensor:
        """Classifier-free guidance from the velocities of prompt and negative prompt, at noise levels [N]."""
        return unguided + self.guidance_scale * (v - unguided)

    def _guides(self) -> bool:
        """True if the pipeline has classifier-free guidance."""
        return True

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self._mu(steps))

    def _mu(self, steps: int) -> float:
        """μ of the scheduler's dynamic shift, or None."""
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
        second = self._config.guidance_scale_2
        if second is not None and not self.lora_from:
            raise ValueError(f"model.guidance_scale_2: {second:g} given, but this {kind} has one network; remove it")
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
    """The family of a pipeline, and the content of its configuration files.

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
    """The family of a loaded transformer."""
    return FlowModel._by_transformer[type(transformer)]
