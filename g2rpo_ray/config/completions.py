"""Settings of cheaper completions: they affect scores, never the policy's likelihood."""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from g2rpo_ray.algo.tree import plan_tree
from g2rpo_ray.config.learner import LearnerConfig
from g2rpo_ray.config.resources import MAX_ACTORS, ActorSection, OneDevice
from g2rpo_ray.config.sampler import SamplerConfig


class CompletionsConfig(ActorSection):
    """Computation of the velocities below the stochastic edges, on which only scores depend."""

    quantization: Literal[
        "none", "int8", "int8_weights", "float8", "float8_weights", "int4_weights", "nvfp4", "nvfp4_weights"
    ] = "none"
    """Quantization of the linear layers of the transformer's blocks by torchao (`pip install g2rpo_ray[completions]`):
    weights and activations, or weights only. `float8` needs a GPU of compute capability 8.9, `nvfp4` of 10.0, and
    `int4_weights` on a GPU the package `mslk` and `model.dtype: bfloat16`."""
    attention_backend: str | None = None
    """Attention backend of completions. Unset: that of `rollout`."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile)."""
    micro_batch: int | None = Field(None, ge=1, le=4096)
    """Maximum latents per evaluation of a completion. Unset: that of `rollout`."""
    max_actors: int = Field(0, ge=0, le=MAX_ACTORS)
    """Actors of a pool of their own for completions, on any devices. Trunks, probes and held-out samples stay with the
    rollout actors. 0: rollout actors compute all."""
    min_actors: int = Field(1, ge=1, le=MAX_ACTORS)
    """Such actors required to start the run."""
    resources: OneDevice = {"GPU": 1}
    """Ray resources of one such actor; its device and threads follow from them, as in `rollout`."""
    probe_every: int = Field(10, ge=1, le=1_000_000)
    """Iterations between probes, which also complete the first prompts exactly: `signal/agreement/completions`."""
    probe_prompts: int = Field(1, ge=0, le=1024)
    """Prompts of a probe."""

    @model_validator(mode="after")
    def _range(self) -> "CompletionsConfig":
        if self.apart and self.min_actors > self.max_actors:
            raise ValueError(f"min_actors: {self.min_actors} given; may be at most max_actors={self.max_actors}")
        return self

    @property
    def apart(self) -> bool:
        """True if actors of their own compute completions."""
        return self.max_actors > 0

    @property
    def need_weights(self) -> bool:
        """True if they need weights of their own, beside those of all other velocities."""
        return self.quantization != "none" or self.attention_backend is not None or self.compile

    @property
    def differ(self) -> bool:
        """True if completions are computed differently from all other velocities, or on other devices."""
        return self.need_weights or self.apart

    def probes(self, iteration: int, slot: int) -> bool:
        """True if the prompt at `slot` of an iteration is completed both ways."""
        return self.differ and iteration % self.probe_every == 0 and slot < self.probe_prompts


def check_completions(completions: CompletionsConfig, sampler: SamplerConfig, learner: LearnerConfig) -> None:
    """Raises ValueError, in one line, if the likelihood of a trained edge would depend on a cheap velocity."""
    if not completions.differ or learner.forward:  # images have no likelihood
        return
    for branch_steps in sampler.placements():
        tree = plan_tree(sampler.shape(branch_steps))
        inside = np.setdiff1d(tree.source[tree.trained], tree.branch_points)
        if len(inside):
            share = len(inside) / tree.completions
            raise ValueError(
                f"rollout.completions: given, but trained edges start at {share:.0%} of the velocities "
                "of branch units, which must be exact; remove it, or train one stochastic edge per branch "
                "(sampler.stochastic_edges=1, no splits)"
            )
