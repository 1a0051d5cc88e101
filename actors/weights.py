"""Versions of the LoRA on their way from the learner to the rollout actors."""

from dataclasses import dataclass

import numpy as np
import ray

from g2rpo_ray.types import WeightsManifest


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One version in the object store. The reference is nested, so that handing it to an actor does not fetch it."""

    manifest: WeightsManifest
    ref: ray.ObjectRef

    def fetch(self) -> dict[str, np.ndarray]:
        """The weights, as they were published.

        Raises:
            WeightsMismatch: another number of tensors, or another checksum, than the manifest says.
        """
        from g2rpo_ray.models import verify  # the driver, which hands weights on, needs no model

        state = ray.get(self.ref)
        verify(state, self.manifest)
        return state
