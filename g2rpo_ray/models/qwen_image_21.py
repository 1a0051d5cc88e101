"""Qwen-Image-2.1: one sequence of text, sources and latents in the order in which the text encoder read them; RGBA."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as published
from PIL.Image import Image
from torch import Tensor

from g2rpo_ray.models import qwen_image
from g2rpo_ray.models.base import ATTENTION, FlowModel
from g2rpo_ray.models.editing import EditingModel, Layout
from g2rpo_ray.types import PromptEmbedding, StoredTensor

LEAST = 32  # pixels of a side, of which the pipeline's are multiples
SOURCE_SIDE = 1024  # a source is seen with about the square of it in pixels: `output_resolution` of the pipeline
TEMPLATE_TOKENS = 24  # around a prompt in its embedding, about
SLOT = 4  # latent tokens to a token of the text encoder that stands for a part of a picture


class QwenImage21Pipeline(diffusers.QwenImage21Pipeline):
    """The pipeline, also without its text parts: diffusers' own asks the processor for its template in any case."""

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, processor: Any, transformer: Any, sample_sigmas: Any = None
    ) -> None:
        parts = scheduler, vae, text_encoder, processor or _NoProcessor(), transformer
        super().__init__(*parts, sample_sigmas=sample_sigmas)


class _NoProcessor:
    tokenizer = property(lambda self: self)

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[]]

    def encode(self, _: str) -> list[int]:
        return [0]


class Model(EditingModel, qwen_image.Model):
    pipeline_class = QwenImage21Pipeline
    transformer_class = QwenImage21Transformer2DModel
    vae_class = AutoencoderKLQwenImage21
    lora_targets, lora_idle = ATTENTION, ()
    once_a_row = ("txt_in",)
    template_tokens = 0

    @staticmethod
    def vae_scale(autoencoder: Mapping[str, Any]) -> int:
        return 16  # whatever the VAE's configuration says

    @property
    def image_tokens(self) -> int:
        return self.rows * self.columns

    def _noise_shape(self) -> tuple[int, ...]:
        return (1, self.network["in_channels"], self.rows, self.columns)

    def _token_grid(self) -> tuple[int, int]:
        return self.rows, self.columns

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        own = self._pipeline.config.sample_sigmas
        if own is None:
            super()._set_timesteps(scheduler, steps)
        elif len(own) == steps:
            scheduler.set_timesteps(sigmas=own, mu=self._mu(steps))
        else:
            raise ValueError(
                f"sampler.steps: {steps} given; the pipeline's own grid has {len(own)} steps: give that number, or set "
                "sampler.shift to a number"
            )

    def _options(self, sources: Sequence[Image]) -> dict[str, Any]:
        resize = self._pipeline.image_processor.resize
        seen = [resize(picture.convert("RGBA"), *self._size_of(picture)) for picture in sources]
        return {"device": self.device, "image": seen or None}

    def _size_of(self, picture: Image) -> tuple[int, int]:
        """Height and width at which text encoder and VAE see a source."""
        area = self._config.source_area or SOURCE_SIDE * SOURCE_SIDE
        width, height, _ = published.calculate_dimensions(area, picture.width / picture.height)
        return max(LEAST, height), max(LEAST, width)

    def _encode(self, prompt: str, negative: bool, **options: Any) -> dict[str, Tensor]:
        embeds, _, slots = self._pipeline.encode_prompt(self._shortened(prompt), **options)
        return {"prompt_embeds": embeds[0], "image_pad_mask": slots[0]}

    def _shortened(self, prompt: str) -> str:
        """The prompt without what is behind `model.max_sequence_length`, if that is set: the pipeline reads it all."""
        limit = self._config.max_sequence_length
        read = self._pipeline.processor.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        tokens = len(read["input_ids"])
        if limit is None or tokens <= limit:
            return prompt
        self._counts.append((tokens, limit))
        return prompt[: read["offset_mapping"][limit - 1][1]]

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.text_tokens + TEMPLATE_TOKENS + self._config.sources * self.image_tokens // SLOT
        return {"prompt_embeds": (length, self.network["context_in_dim"])}

    def random_embedding(self, prompt: str, generator: torch.Generator) -> PromptEmbedding:
        embedding = super().random_embedding(prompt, generator)
        slots = torch.zeros(len(embedding.tensors["prompt_embeds"].data), dtype=torch.bool, device="cpu")
        slots[: self._config.sources * self.image_tokens // SLOT] = True
        return replace(embedding, tensors={**embedding.tensors, "image_pad_mask": StoredTensor.of(slots)})

    def _source_tokens(self, picture: Image) -> tuple[Tensor, tuple[int, int]]:
        pixels = self._pipeline.image_processor.preprocess(picture.convert("RGBA"), *self._size_of(picture)).unsqueeze(
            2
        )
        latent = self._pipeline._encode_vae_image(pixels.to(self.device, self._dtype), None).squeeze(2)  # a frame
        return self._pack(latent)[0], (latent.shape[2], latent.shape[3])

    def _source_places(self, layout: Layout) -> Tensor:
        return torch.tensor(layout)

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        # what is read on the host, as places are, stays there
        slots = [_runs(mask) for mask in columns["image_pad_mask"]]
        text = {"encoder_hidden_states": list(columns["prompt_embeds"]), "source_slots": slots}
        if "source_latents" in columns:
            places = [rows.tolist() for rows in columns["source_places"]]
            text |= {"source_latents": list(columns["source_latents"]), "source_places": places}
        return text

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        """Positions depend on the length of the prompt with its padding, so prompts of unlike length meet in no call.
        Where a call is a collective each row has its own, so that all ranks make as many."""
        rows = range(len(x))
        kinds = list(rows) if self.collective else [len(prompt) for prompt in text["encoder_hidden_states"]]
        found: dict[int, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            some = [row for row in rows if kinds[row] == kind]
            if len(some) == len(rows):
                return self._evaluate(x, sigma, text)
            chosen = {name: [values[row] for row in some] for name, values in text.items()}
            at, when = (torch.stack([values[row] for row in some]) for values in (x, sigma))
            found |= dict(zip(some, self._evaluate(at, when, chosen), strict=True))
        return torch.stack([found[row] for row in rows])

    def _evaluate(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        """One call, for prompts of one length."""
        source = [torch.stack(text["source_latents"]).to(x)] if "source_latents" in text else []
        sizes, prompts = text["source_places"][0] if source else [], torch.stack(text["encoder_hidden_states"])
        length, own = prompts.shape[1], self.image_tokens // SLOT
        slots = torch.zeros(len(x), length + own, dtype=torch.bool, device=x.device)
        for start, end in (*text["source_slots"][0], (length, length + own)):
            slots[:, start:end] = True
        output: Tensor = self.transformer(
            hidden_states=torch.cat([*source, x], 1).to(self._dtype), timestep=sigma, encoder_hidden_states=prompts,
            img_shapes=[[*((1, *size) for size in sizes), (1, self.rows, self.columns)]] * len(x), img_mask=slots,
            return_dict=False,
        )[0]  # fmt: skip
        return output[:, -x.shape[1] :].float()

    def _guide(self, v: Tensor, unguided: Tensor, sigma: Tensor) -> Tensor:
        return FlowModel._guide(self, v, unguided, sigma)

    def _rgb(self, unit: Tensor) -> Tensor:
        colours, alpha = unit[:, :3], unit[:, 3:]
        return colours * alpha + 1 - alpha if alpha.shape[1] else colours


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """Where it is true: first places, and those behind the last ones."""
    ends = torch.diff(mask.int(), prepend=mask.new_zeros(1).int(), append=mask.new_zeros(1).int()).nonzero().flatten()
    return list(zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True))
