"""Decodes a unit's latents as soon as a batch is complete, concurrently with velocities."""

from collections.abc import Iterable

import torch
from torch import Tensor

from g2rpo_ray.config import Config
from g2rpo_ray.models import FlowModel
from g2rpo_ray.types import Images


class Decoder:
    """The VAE of a rollout actor. On a GPU it has its own stream for its passes and the copies to the host."""

    def __init__(self, config: Config, model: FlowModel):
        self._config, self._model = config, model
        self._stream = torch.cuda.Stream() if model.device == "cuda" else None

    def unit(self, count: int) -> "Decoding":
        """Starts a unit with `count` images."""
        model = self._config.model
        frames = (model.frames,) if model.frames > 1 else ()
        shape = (count, *frames, model.height, model.width, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None)
        return Decoding(self._model, images, self._config.rollout.decode_batch, self._stream)


class Decoding:
    """The images of one unit. Row r is always in batch r // `size`, so that images do not depend on timing."""

    def __init__(self, model: FlowModel, images: Tensor, size: int, stream: torch.cuda.Stream | None):
        self._model, self._images, self._size, self._stream = model, images, size, stream
        self._missing = [len(batch) for batch in images.split(size)]

    def ended(self, rows: Iterable[int], latents: Tensor) -> None:
        """Marks rows of latents [N, L, D] as final, and decodes the batches that are complete."""
        for batch in [row // self._size for row in rows]:
            self._missing[batch] -= 1
            if not self._missing[batch]:
                self._decode(slice(batch * self._size, (batch + 1) * self._size), latents)

    def images(self) -> Images:
        """The images uint8 [N, H, W, 3], or videos uint8 [N, F, H, W, 3], after all rows have ended."""
        assert not any(self._missing), "a row has not ended"
        if self._stream:
            self._stream.synchronize()
        return self._images.numpy()

    def _decode(self, rows: slice, latents: Tensor) -> None:
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
            latents.record_stream(self._stream)  # keeps their memory until they are decoded
        with torch.cuda.stream(self._stream):  # no stream on the CPU
            self._images[rows].copy_(self._model.decode(latents[rows]), non_blocking=True)
