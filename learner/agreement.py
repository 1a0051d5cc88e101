"""Whether rollout and learner compute the same policy, at states whose velocity the rollout has stored."""

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
    """Evaluates prompts at their first branch point, where their trunk's velocity is known. No gradients."""

    def __init__(self, config: Config, model: FlowModel, transformer: torch.nn.Module, sigmas: Tensor, copies: Copies):
        """`transformer`: the module that has the LoRA, which `model` may call through a wrapper."""
        self._config, self._copies = config, copies
        self._model, self._transformer, self._sigmas = model, transformer, sigmas

    def observe_velocities(self, rollouts: Sequence[PromptRollout], prompts: int, metrics: RankMetrics) -> None:
        """The relative errors of the learner's velocities, one a prompt.

        Every rank evaluates as many: its share, rounded up, of all prompts.
        """
        most = -(-prompts // self._config.learner.ranks)
        padded = [*rollouts, *[rollouts[0]] * (most - len(rollouts))]
        # with sources one by one: those of a batch have equal sizes, and every rank makes as many passes
        size = 1 if self._config.model.sources else self._config.learner.micro_batch
        for some in micro_batches(padded, size):
            found, expected = self._velocity(some), self._stored(some, "velocities")
            metrics.observe({"velocity": relative_error(found, expected)})

    def observe_delivery(self, rollout: PromptRollout, metrics: RankMetrics) -> None:
        """How much of what the LoRA changes in the learner's velocity it changes in the rollout's: two evaluations.

        `watch/lora_effect` is that change in the learner, as a share of the base's velocity; `watch/lora_delivered` the
        share of it that the rollout's velocity has: 1 where the LoRA was delivered, 0 where the base sampled.
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
        """[N, ...] of the policy that sampled, or of whatever the transformer is now."""
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
        """[N, ...]: what the trunks have stored at their first branch point."""
        arrays = [getattr(rollout.trunk, kind)[0] for rollout in rollouts]
        return torch.tensor(np.stack(arrays), device=self._config.learner.device)
