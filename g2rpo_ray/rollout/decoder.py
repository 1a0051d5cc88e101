"""Images of a unit's latents, decoded as soon as these are there, beside the velocities that follow."""

from collections.abc import Iterable

import torch
from torch import Tensor

from g2rpo_ray.config import Config
from g2rpo_ray.models import FlowModel
from g2rpo_ray.types import Images


class Decoder:
    """The VAE of a rollout worker. On a GPU it has a stream of its own, for its passes and the copies to the host."""

    def __init__(self, config: Config, model: FlowModel):
        self._config, self._model = config, model
        self._stream = torch.cuda.Stream() if config.rollout.device == "cuda" else None

    def unit(self, count: int) -> "Decoding":
        """Begin with a unit that ends with `count` images."""
        model = self._config.model
        frames = (model.frames,) if model.frames > 1 else ()
        shape = (count, *frames, model.height, model.width, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None)
        return Decoding(self._model, images, self._config.rollout.decode_batch, self._stream)


class Decoding:
    """The images of one unit: row r is in batch r // `size` whatever ends first, so that no image depends on that."""

    def __init__(self, model: FlowModel, images: Tensor, size: int, stream: torch.cuda.Stream | None):
        self._model, self._images, self._size, self._stream = model, images, size, stream
        self._missing = [len(batch) for batch in images.split(size)]

    def ended(self, rows: Iterable[int], latents: Tensor) -> None:
        """These rows of latents [N, L, D] are at the image and will not change: decode the batches they complete."""
        for batch in [row // self._size for row in rows]:
            self._missing[batch] -= 1
            if not self._missing[batch]:
                self._decode(slice(batch * self._size, (batch + 1) * self._size), latents)

    def images(self) -> Images:
        """Images [N, H, W, 3], or videos [N, F, H, W, 3], when all have ended and are here."""
        assert not any(self._missing), "a row has not ended"
        if self._stream:
            self._stream.synchronize()
        return self._images.numpy()

    def _decode(self, rows: slice, latents: Tensor) -> None:
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
            latents.record_stream(self._stream)  # nobody else gets their memory before they are decoded
        with torch.cuda.stream(self._stream):  # none on the CPU, and no change
            self._images[rows].copy_(self._model.decode(latents[rows]), non_blocking=True)
