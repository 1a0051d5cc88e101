"""Editing models: tokens of source images are appended to those of the latent, and removed from its velocity."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from g2rpo_ray.models.base import FlowModel
from g2rpo_ray.types import PromptEmbedding, StoredTensor

Layout = Sequence[tuple[int, int]]
"""Rows and columns of each source's tokens."""


class EditingModel(FlowModel):
    """A family whose prompts may have sources.

    An embedding has two tensors of them: `source_latents` [S, D], encoded once, and `source_places`, whole numbers that
    tell where the S tokens are. The prompts of a batch have sources of equal sizes, or none.
    """

    sources = (0, 10)

    def _source_tokens(self, picture: Image) -> tuple[Tensor, tuple[int, int]]:
        """The tokens [S, D] of an RGB image, encoded at the pipeline's size for it, and their rows and columns."""
        raise NotImplementedError

    def _source_places(self, layout: Layout) -> Tensor:
        """Positions of the tokens, as integers."""
        raise NotImplementedError

    def _token_grid(self) -> tuple[int, int]:
        """Rows and columns of a source's tokens, for sources of the result's size."""
        return self.rows // 2, self.columns // 2

    def _source_tensors(self, sources: Sequence[Image]) -> dict[str, Tensor]:
        tokens, layout = zip(*map(self._source_tokens, sources), strict=True)
        return {"source_latents": torch.cat(tokens), "source_places": self._source_places(layout)}

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, width = self.latent_shape
        given = self._config.sources
        return super().stored_shapes() | ({"source_latents": (given * tokens, width)} if given else {})

    def random_embedding(self, prompt: str, generator: torch.Generator) -> PromptEmbedding:
        embedding = super().random_embedding(prompt, generator)
        if not self._config.sources:
            return embedding
        with torch.device("cpu"):
            places = self._source_places([self._token_grid()] * self._config.sources)
        return PromptEmbedding(prompt, {**embedding.tensors, "source_places": StoredTensor.of(places)})

    def _collate(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        sources = {name: torch.stack(list(columns[name])) for name in columns if name.startswith("source_")}
        return super()._collate(columns) | sources

    @staticmethod
    def _with_places(ids: Tensor, text: Mapping[str, Any]) -> Tensor:
        """The positions [..., L, P] of the latent's tokens, followed by those of the sources' tokens."""
        places = text.get("source_places")
        if places is None:
            return ids
        return torch.cat([ids, places[0].to(ids).expand(*ids.shape[:-2], -1, -1)], dim=-2)

    def _predict(self, x: Tensor, sigma: Tensor, text: Mapping[str, Any]) -> Tensor:
        source = text.get("source_latents")
        if source is None:
            return super()._predict(x, sigma, text)
        return super()._predict(torch.cat([x, source.to(x)], 1), sigma, text)[:, : x.shape[1]]
