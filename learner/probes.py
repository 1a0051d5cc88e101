"""Gradients of the probes of `auto`: for each branch step and granularity separately, projected and compared.

a state ─► one velocity ─► log-probs of its edges ─► with the advantages of each stride: a gradient ─► a few numbers
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from g2rpo_ray.algo.alignment import Alignment, align
from g2rpo_ray.algo.credit import edge_advantages
from g2rpo_ray.config import Config
from g2rpo_ray.learner.batch import BatchShape
from g2rpo_ray.learner.loss import EdgeLoss, all_states
from g2rpo_ray.types import FloatArray, PromptRollout

PROJECTION_SIZE = 2048  # numbers of a projected gradient
MAX_PROMPTS = 64  # newest probed prompts that are kept
MIN_PROMPTS = 3  # so that the jackknife, which omits one, still has pairs


class Probes:
    """The projected gradients of the newest probed prompts, equal on every rank. Part of the checkpoint."""

    def __init__(self, config: Config, loss: EdgeLoss, lora: Mapping[str, nn.Parameter], saved: FloatArray | None):
        """`saved` is an earlier `gradients`, measured by the same `rule`."""
        self._config, self._loss, self._lora = config, loss, list(lora.values())
        self._steps, self._strides = config.sampler.probed_steps, config.sampler.probed_strides
        nothing = np.zeros((0, len(self._steps), len(self._strides), PROJECTION_SIZE), np.float32)
        self.gradients: FloatArray = nothing if saved is None else saved

    def observe(self, shard: Sequence[PromptRollout], batch: BatchShape) -> Alignment | None:
        """The alignment over all kept prompts, if prompts of this iteration probe. Every rank must call it.

        `shard` has this rank's prompts. They are evaluated one by one, so that the result does not depend on the ranks.
        """
        prompts = range(self._config.data.prompts_per_iteration)
        slots = [slot for slot in prompts if self._config.sampler.probes(batch.iteration, slot)]
        if not slots:
            return None
        found = torch.zeros(len(slots), *self.gradients.shape[1:])
        for rollout in shard:
            if rollout.slot in slots and np.isfinite(rollout.scores).any():  # else it is a copy for an empty rank
                found[slots.index(rollout.slot)] = self._gradients(rollout, batch)
        on_device = found.to(self._config.learner.device)
        torch.distributed.all_reduce(on_device)
        new = on_device.cpu().numpy()
        scored = new[np.abs(new).sum((1, 2, 3)) > 0]
        self.gradients = np.concatenate([self.gradients, scored])[-MAX_PROMPTS:]
        if len(self.gradients) < MIN_PROMPTS:
            return None
        return align(self.gradients, self._steps, self._strides)

    def _gradients(self, rollout: PromptRollout, batch: BatchShape) -> Tensor:
        """Projected gradients [M, J, PROJECTION_SIZE] of a prompt: of each step's mean advantage × log-probability."""
        tree = rollout.tree
        advantages = [self._advantages(rollout, batch, stride) for stride in self._strides]
        sizes, found = [parameter.numel() for parameter in self._lora], torch.zeros(self.gradients.shape[1:])
        for state in all_states(rollout):
            if state.start not in self._steps:
                continue
            log_prob = self._loss.log_probs(state)
            step, number = self._steps.index(state.start), int((tree.start == state.start).sum())
            for place, advantage in enumerate(advantages):
                weight = (advantage[state.edges] / number).to(log_prob)
                last = place == len(advantages) - 1
                gradient = torch.autograd.grad(log_prob, self._lora, weight, retain_graph=not last, allow_unused=True)
                found[step, place] += projected(gradient, sizes, PROJECTION_SIZE).cpu()
        return found

    def _advantages(self, rollout: PromptRollout, batch: BatchShape, stride: int) -> Tensor:
        """Advantages [E] of all edges by the leaves of one stride; 0: of all strides, as they are trained."""
        credit, tree = self._config.credit, rollout.tree
        weights = [float(stride == one) for one in tree.strides] if stride else credit.granularity_weights
        whole = replace(tree, trained=np.ones_like(tree.trained))
        return torch.tensor(
            edge_advantages(
                whole,
                rollout.scores,
                group=credit.group,
                spread=credit.spread,
                batch_std=batch.batch_std or None,
                reward_weights=self._config.credit_weights,
                granularity_weights=weights,
                clip=credit.clip,
                least_spread=credit.least_spread,
            )
        )


def rule(config: Config) -> str:
    """The settings that gradients of probes depend on, as text. Gradients of another rule are not compared."""
    rewards = {name: [reward.kind, reward.weight] for name, reward in config.rewards.items()}
    steps, strides = config.sampler.probed_steps, config.sampler.probed_strides
    return json.dumps([steps, strides, config.credit.model_dump(mode="json"), rewards])


def projected(gradient: Sequence[Tensor | None], sizes: Sequence[int], numbers: int) -> Tensor:
    """A projection [numbers] of a gradient: with random signs, summed over every `numbers`-th element.

    It keeps inner products without bias, with noise of 1 / √numbers of the norms. The signs are a hash of the
    element's index, equal on all machines.

    Args:
        gradient: one part per parameter; None for 0.
        sizes: elements of each part.
        numbers: size of the projection.
    """
    total: Any = 0
    start = 0
    for part, size in zip(gradient, sizes, strict=True):
        if part is not None:
            signed = part.detach().float().flatten() * _signs(start, size, part.device)
            before = start % numbers  # keeps the positions of elements
            padded = nn.functional.pad(signed, (before, -(before + size) % numbers))
            total = total + padded.view(-1, numbers).sum(0)
        start += size
    return torch.as_tensor(total)


def _signs(start: int, length: int, device: torch.device) -> Tensor:
    """Signs ±1 of these indices: a bit of splitmix64, in wrapping integers."""
    x = torch.arange(start, start + length, device=device) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return ((x >> 31) & 1) * 2.0 - 1.0
