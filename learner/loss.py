"""From a shard of rollouts to losses: the states of each optimizer step, and what each adds to its loss. No DeepSpeed.

scores ─► advantages of edges ─┐
a state x ─► one velocity ─► log-probs of all its edges ─► objective ─► part of the loss
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo import (
    NEEDS_DRIFT,
    Tree,
    edge_advantages,
    edge_losses,
    edge_values,
    groups,
    mean_shift,
    policy_loss,
    scored_edges,
    step_between,
    transition,
    without_spread,
)
from g2rpo_ray.config import Config
from g2rpo_ray.models import FlowModel, lora_disabled
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import edge_key
from g2rpo_ray.types import FloatArray, Ints, PromptRollout
from learner.batch import BatchShape, RankMetrics, StepKey, StepShape, state_places
from learner.forward import image_states


@dataclass(frozen=True, slots=True)
class State:
    """A parent of trained edges: what a velocity is evaluated at, and the edges that it serves."""

    rollout: PromptRollout
    latent: FloatArray  # [L, D]
    start: int  # schedule indices
    end: int
    edges: Ints  # [e]
    next_latents: FloatArray  # [e, L, D]
    old_log_prob: FloatArray  # [e]
    advantage: Tensor  # [e]
    valid: Tensor  # [e] bool


def states_of(
    config: Config, shard: Sequence[PromptRollout], batch: BatchShape, metrics: RankMetrics
) -> dict[StepKey, list[Any]]:
    """The rank's states of each optimizer step, as many as the batch says: those added count in no loss.

    They are what the objective's loss takes: `State` or `ImageState`.
    """
    found: dict[StepKey, list[Any]] = {step.key: [] for step in batch.steps}
    spare: list[Any] = []
    for rollout in shard:
        credit = _credit(config, rollout, batch, metrics)
        made = image_states if config.learner.forward else _edge_states
        for key, state in made(config, rollout, batch.prompts, _latents(rollout), *credit):
            spare.append(replace(state, valid=torch.zeros_like(state.valid)))
            if key in found:
                found[key].append(state)
    return {step.key: found[step.key] + spare[:1] * (step.states - len(found[step.key])) for step in batch.steps}


def _edge_states(
    config: Config,
    rollout: PromptRollout,
    prompts: int,
    latents: Mapping[int, FloatArray],
    advantage: Tensor,
    scored: Tensor,
) -> Iterator[tuple[StepKey, State]]:
    """The states of a prompt, each with its optimizer step."""
    tree, log_prob = rollout.tree, _log_probs(rollout)
    for key, node, edges, _ in state_places(rollout, prompts, config.learner):
        yield (
            key,
            State(
                rollout=rollout,
                latent=latents[node],
                start=int(tree.index[node]),
                end=int(tree.end[edges[0]]),
                edges=edges,
                next_latents=np.stack([latents[target] for target in tree.target[edges]]),
                old_log_prob=log_prob[edges],
                advantage=advantage[edges],
                valid=scored[edges],
            ),
        )


def _credit(config: Config, rollout: PromptRollout, batch: BatchShape, metrics: RankMetrics) -> tuple[Tensor, Tensor]:
    """Advantages [E] of a prompt, and which of its trained edges are in the loss."""
    credit, tree, scores = config.credit, rollout.tree, torch.tensor(rollout.scores)
    trained = torch.tensor(tree.trained)
    scored = scored_edges(tree, scores) & trained
    advantage = edge_advantages(
        tree,
        scores,
        group=credit.group,
        spread=credit.spread,
        batch_std=batch.batch_std or None,
        reward_weights=[reward.weight for reward in config.rewards.values()],
        granularity_weights=_granularity_weights(config, tree),
        clip=credit.clip,
    )
    values = edge_values(tree, scores)
    number = torch.tensor(groups(tree, credit.group))
    compared = [group for group in number.unique() if trained[number == group].any()]
    some = torch.stack([values[..., number == group].isfinite().any(-1) for group in compared], -1)
    flat = (
        without_spread(tree, values, credit.group)[..., compared] & some
    )  # one without any score is missing, not flat
    metrics.add_advantages(advantage[scored], int(flat.sum()))
    return advantage, scored


def _granularity_weights(config: Config, tree: Tree) -> Sequence[float] | None:
    """Of a probe of `auto` the finest alone counts: it is what the others are measured by, and it is paid for."""
    if config.sampler.strides == "auto":
        return [float(stride == min(tree.strides)) for stride in tree.strides]
    return config.credit.granularity_weights


def _latents(rollout: PromptRollout) -> dict[int, FloatArray]:
    """The latents that the learner needs, by node."""
    points = dict(zip(rollout.tree.branch_points.tolist(), rollout.trunk.latents, strict=True))
    below = (zip(unit.nodes.tolist(), unit.latents, strict=True) for unit in rollout.branches)
    return points | {node: latent for part in below for node, latent in part}


def _log_probs(rollout: PromptRollout) -> FloatArray:
    """[E], under the policy that sampled."""
    log_prob = np.full(len(rollout.tree.source), np.nan, np.float32)
    for unit in rollout.branches:
        log_prob[unit.edges] = unit.log_prob
    return log_prob


class EdgeLoss:
    """What states add to an optimizer step's loss: one velocity a state, whatever the number of its edges."""

    def __init__(self, config: Config, model: FlowModel, transformer: torch.nn.Module, sigmas: Tensor, device: str):
        """`transformer`: the module that has the LoRA, which `model` may call through a wrapper."""
        self._config, self._learner, self._sampler = config, config.learner, config.sampler
        self._model, self._transformer, self._sigmas, self._device = model, transformer, sigmas, device

    def __call__(self, states: Sequence[State], step: StepShape) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """(part of the loss, metrics) of each state, over the step's denominator."""
        x = torch.stack([torch.tensor(state.latent) for state in states]).to(self._device)
        sigma = self._sigmas[[state.start for state in states]].to(self._device)
        embeddings = [state.rollout.embedding for state in states]
        negative = embeddings[0].negative if self._sampler.guidance else None
        conditioning = self._model.condition(embeddings, negative)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self._model.velocity(x, sigma, conditioning)

        reference: Sequence[Tensor | None] = [None] * len(states)
        if self._learner.kl_beta > 0:
            with torch.no_grad(), lora_disabled(self._transformer):
                reference = velocity(x, sigma).split(1)
        v = velocity(x, sigma)
        subpaths = [self._subpath(velocity, states, x, v, parts) for parts in self._learner.subpaths]
        return [
            self._state_loss(
                state, x[at, None], v[at, None], reference[at], [path[at] for path in subpaths], step.edges
            )
            for at, state in enumerate(states)
        ]

    def _state_loss(
        self,
        state: State,
        x: Tensor,
        velocity: Tensor,
        reference: Tensor | None,
        subpaths: Sequence[tuple[Tensor, Tensor, float]],
        denominator: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the edges that start at x [1, L, D], by its velocity [1, L, D]; metrics over the denominator."""
        next_x = torch.tensor(state.next_latents, device=self._device)
        advantage, valid = state.advantage.to(self._device), state.valid.to(self._device)
        kernel, eta, sigmas = self._sampler.kernel, self._sampler.eta, self._sigmas
        new = transition(kernel, x, velocity, sigmas, state.start, eta, next_index=state.end, next_x=next_x)
        assert new.log_prob is not None  # eta > 0, and no trained step without noise: the configuration sees to it
        std = torch.full_like(new.log_prob, new.std)
        weight = None if self._learner.edge_weight is None else self._learner.edge_weight * std
        loss, metrics = policy_loss(
            self._learner.objective,
            new.log_prob,
            torch.tensor(state.old_log_prob, device=self._device),
            advantage,
            clip_range=self._learner.clip_range,
            valid=valid,
            denominator=denominator,
            weight=weight,
            std=std,
            drift=self._drift(state, new.mean, next_x, new.std) if self._learner.objective in NEEDS_DRIFT else None,
            delta=torch.full_like(std, float(sigmas[state.end] - sigmas[state.start])),
        )
        for start, v, sigma in subpaths:
            end, first = float(sigmas[state.end]), float(sigmas[1])
            path = step_between(kernel, start[None], v[None], sigma, end, eta, first=first, next_x=next_x)
            assert path.log_prob is not None
            losses = edge_losses("reinforce", path.log_prob, path.log_prob, advantage, clip_range=0.0)
            losses = losses if weight is None else weight * losses
            loss = loss + torch.where(valid, losses, 0).sum() / denominator / len(subpaths)
        metrics["kl"] = torch.zeros_like(loss)
        if reference is not None:
            base = transition(kernel, x, reference, sigmas, state.start, eta, next_index=state.end, next_x=next_x)
            kl = mean_shift(new.mean, base.mean, new.std)[0] * valid.sum() / denominator
            loss = loss + self._learner.kl_beta * kl
            metrics["kl"] = kl.detach()
        metrics["loss"] = loss.detach()
        return loss, metrics

    def _drift(self, state: State, mean: Tensor, next_x: Tensor, std: float) -> Tensor:
        """[e]: mean (μ − μ_old)² / (2 std²); the edge's own noise, which its key gives again, tells μ_old."""
        keys = [edge_key(self._config, state.rollout, state.rollout.tree, int(edge)) for edge in state.edges]
        noise = torch.stack([self._model.initial_noise(generator(*key)) for key in keys]).to(self._device)
        return mean_shift(mean, next_x - std * noise, std)

    def _subpath(
        self, velocity: Callable[[Tensor, Tensor], Tensor], states: Sequence[State], x: Tensor, v: Tensor, parts: int
    ) -> list[tuple[Tensor, Tensor, float]]:
        """(x [L, D], velocity [L, D], sigma) of each state after all but the last of `parts` substeps by ODE.

        The substeps are even in sigma, and gradients go through all of them (Pave-GRPO).
        """
        start, end = (self._sigmas[[getattr(s, side) for s in states]].to(x) for side in ("start", "end"))
        delta = (end - start) / parts
        sigma = start
        for number in range(1, parts):
            x = x + delta.view(-1, *[1] * (x.ndim - 1)) * v
            sigma = start + number * delta
            v = velocity(x, sigma)
        return list(zip(x, v, sigma.tolist(), strict=True))
