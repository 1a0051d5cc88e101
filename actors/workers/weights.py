"""Published versions of the LoRA, which rollout actors fetch from the object store."""

from dataclasses import dataclass

import numpy as np
import ray

from g2rpo_ray.types import WeightsManifest


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One version in the object store. The reference is nested, so that passing it to an actor does not fetch it."""

    manifest: WeightsManifest
    ref: ray.ObjectRef

    def fetch(self) -> dict[str, np.ndarray]:
        """Fetch the weights, by name.

        Raises:
            WeightsMismatch: the number of tensors or the checksum differs from the manifest.
        """
        from g2rpo_ray.models import verify  # the driver, which only passes weights on, loads no model code

        state = ray.get(self.ref)
        verify(state, self.manifest)
        return state
