"""Checks that rollout and learner compute the same policy, at states whose velocity the rollout stored."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.config import Config
from g2rpo_ray.learner.batch import RankMetrics, micro_batches, relative_error
from g2rpo_ray.learner.copies import Copies
from g2rpo_ray.models import FlowModel, lora_disabled, lora_replaced, negatives
from g2rpo_ray.types import PromptRollout


class Agreement:
    """Evaluates prompts at their first branch point, where the trunk's velocity is stored. No gradients."""

    def __init__(self, config: Config, model: FlowModel, transformer: torch.nn.Module, sigmas: Tensor, copies: Copies):
        """`transformer` is the module with the LoRA, which `model` may call through a wrapper."""
        self._config, self._copies = config, copies
        self._model, self._transformer, self._sigmas = model, transformer, sigmas

    def observe_velocities(self, rollouts: Sequence[PromptRollout], prompts: int, metrics: RankMetrics) -> None:
        """Adds the relative errors of the learner's velocities, one per prompt, to `metrics`.

        Every rank evaluates the same number, its share of all prompts rounded up.
        """
        most = -(-prompts // self._config.learner.ranks)
        padded = [*rollouts, *[rollouts[0]] * (most - len(rollouts))]
        # with sources one by one, because a batch has equal sizes, and all ranks make the same number of passes
        size = 1 if self._config.model.sources else self._config.learner.micro_batch
        for some in micro_batches(padded, size):
            found, expected = self._velocity(some), self._stored(some, "velocities")
            metrics.observe({"velocity": relative_error(found, expected)})

    def observe_delivery(self, rollout: PromptRollout, metrics: RankMetrics) -> None:
        """Checks that the rollout used the LoRA, by two evaluations.

        `watch/lora_effect` is the LoRA's change of the learner's velocity, as a share of the base's velocity.
        `watch/lora_delivered` is the share of this change in the rollout's velocity: 1 if the LoRA was used, 0 if the
        base sampled.
        """
        with lora_disabled(self._transformer):
            base = self._velocity([rollout], sampled=False)
        moved = self._velocity([rollout]) - base
        size = float(moved.norm())
        metrics.largest("watch/lora_effect", size / float(base.norm()))
        if size > 0:
            sampled = self._stored([rollout], "velocities") - base
            metrics.largest("watch/lora_delivered", float((sampled * moved).sum()) / size**2)

    @torch.no_grad()
    def _velocity(self, rollouts: Sequence[PromptRollout], sampled: bool = True) -> Tensor:
        """Velocities [N, ...] of the sampling policy, or of the transformer in its present state."""
        x = self._stored(rollouts, "latents")
        starts = [int(rollout.tree.index[rollout.tree.branch_points[0]]) for rollout in rollouts]
        embeddings = [rollout.embedding for rollout in rollouts]
        negative = negatives(embeddings) if self._config.sampler.guidance else None
        conditioning = self._model.condition(embeddings, negative)
        sigma = self._sigmas[starts].to(x)
        if not sampled or self._copies.old is None:
            return self._model.velocity(x, sigma, conditioning)
        with lora_replaced(self._transformer, self._copies.old):
            return self._model.velocity(x, sigma, conditioning)

    def _stored(self, rollouts: Sequence[PromptRollout], kind: str) -> Tensor:
        """The trunks' stored arrays [N, ...] at their first branch point."""
        arrays = [getattr(rollout.trunk, kind)[0] for rollout in rollouts]
        return torch.tensor(np.stack(arrays), device=self._config.learner.device)
