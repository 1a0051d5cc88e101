"""From a shard of rollouts to losses: the states of each optimizer step, and their parts of the loss. No DeepSpeed.

scores ─► advantages of edges ─┐
a state x ─► one velocity ─► log-probs of all its edges ─► objective ─► part of the loss
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo.credit import edge_advantages, edge_values, scored_edges, without_spread
from g2rpo_ray.algo.growth import Velocity
from g2rpo_ray.algo.kernels import Transition, step_between, time_weight, transition
from g2rpo_ray.algo.objectives import cut_off, edge_losses, edge_ratios, mean_shift, needs_drift, policy_loss
from g2rpo_ray.algo.tree import Tree, groups
from g2rpo_ray.config import Config
from g2rpo_ray.learner.batch import BatchShape, Part, RankMetrics, StepShape, micro_batches, padded, relative_error
from g2rpo_ray.learner.copies import Copies
from g2rpo_ray.learner.forward import image_states
from g2rpo_ray.models import FlowModel, lora_disabled, lora_replaced, negatives
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import StepKey, edge_key, state_places
from g2rpo_ray.types import FloatArray, Ints, PromptRollout


@dataclass(frozen=True, slots=True)
class Old:
    """The edges of a state under the sampling policy."""

    log_prob: Tensor  # [e]
    std: float  # of the step
    mean: Tensor | None  # of the step, [1 or e, L, D], if the objective needs the drift


@dataclass(frozen=True, slots=True)
class State:
    """A parent of trained edges, where one velocity serves all of its edges."""

    rollout: PromptRollout
    latent: FloatArray  # [L, D]
    velocity: FloatArray | None  # [L, D], the rollout's, at branch points
    start: int  # schedule indices
    end: int
    edges: Ints  # [e]
    next_latents: FloatArray  # [e, L, D]
    log_prob: FloatArray  # [e], the rollout's
    advantage: Tensor  # [e]
    valid: Tensor  # [e] bool
    old: Old | None = None
    """The edges under the sampling policy, for optimizer steps after the first."""


def states_of(
    config: Config, shard: Sequence[PromptRollout], batch: BatchShape, metrics: RankMetrics
) -> dict[StepKey, list[Any]]:
    """The rank's states of each optimizer step, padded to the batch's number by states that count in no loss.

    They are `State` or `ImageState`, by the objective.
    """
    found: dict[StepKey, list[Any]] = {step.key: [] for step in batch.steps}
    spare: list[Any] = []
    for rollout in shard:
        credit, latents = _credit(config, rollout, batch, metrics), latents_of(rollout)
        if np.isfinite(rollout.scores).any():  # else it is a copy for a rank without prompts
            metrics.add("watch/duplicate_children", _duplicates(rollout.tree, latents))
        made = image_states if config.learner.forward else edge_states
        for key, state in made(config, rollout, batch.prompts, latents, *credit):
            spare.append(replace(state, valid=torch.zeros_like(state.valid)))
            if key in found:
                found[key].append(state)
    return {step.key: padded(found[step.key], spare, step, lambda state: state.rollout.prompt) for step in batch.steps}


def all_states(rollout: PromptRollout) -> Iterator[State]:
    """The states of a probe, of all stochastic edges, trained or not, without advantages."""
    nothing = torch.zeros(len(rollout.tree.source))
    made = _maker(rollout, latents_of(rollout), nothing, nothing)
    for node in np.unique(rollout.tree.source).tolist():
        yield made(node, np.flatnonzero(rollout.tree.source == node))


def edge_states(
    config: Config,
    rollout: PromptRollout,
    prompts: int,
    latents: Mapping[int, FloatArray],
    advantage: Tensor,
    scored: Tensor,
) -> Iterator[tuple[StepKey, State]]:
    """The states of a prompt, each with its optimizer step."""
    made = _maker(rollout, latents, advantage, scored)
    for key, node, edges, _ in state_places(rollout.tree, rollout.slot, prompts, config.learner):
        yield key, made(node, edges)


def _maker(
    rollout: PromptRollout, latents: Mapping[int, FloatArray], advantage: Tensor, scored: Tensor
) -> Callable[[int, Ints], State]:
    """A function from a node and its edges to a state."""
    tree, log_prob = rollout.tree, _log_probs(rollout)
    velocities = dict(zip(tree.branch_points.tolist(), rollout.trunk.velocities, strict=True))

    def made(node: int, edges: Ints) -> State:
        return State(
            rollout=rollout,
            latent=latents[node],
            velocity=velocities.get(node),
            start=int(tree.index[node]),
            end=int(tree.end[edges[0]]),
            edges=edges,
            next_latents=np.stack([latents[target] for target in tree.target[edges]]),
            log_prob=log_prob[edges],
            advantage=advantage[edges],
            valid=scored[edges],
        )

    return made


def _credit(config: Config, rollout: PromptRollout, batch: BatchShape, metrics: RankMetrics) -> tuple[Tensor, Tensor]:
    """Advantages [E] of a prompt, and bool [E] of the edges in the loss."""
    credit, tree, scores = config.credit, rollout.tree, rollout.scores
    assert len(scores) == len(config.credit_weights)  # those of with_credit_scores
    scored = scored_edges(tree, scores) & tree.trained
    advantage = edge_advantages(
        tree,
        scores,
        group=credit.group,
        spread=credit.spread,
        batch_std=batch.batch_std or None,
        reward_weights=config.credit_weights,
        granularity_weights=_granularity_weights(config, tree),
        clip=credit.clip,
        least_spread=credit.least_spread,
    )
    values, number = edge_values(tree, scores), groups(tree, credit.group)
    compared = np.unique(number[tree.trained])
    some = np.stack([np.isfinite(values[..., number == group]).any(-1) for group in compared], -1)
    flat = without_spread(tree, values, credit.group, credit.least_spread)[..., compared]
    flat &= some  # without any score it is missing, not flat
    metrics.add_advantages(advantage[scored], int(flat.sum()), int(some.sum()))
    return torch.tensor(advantage), torch.tensor(scored)


def _granularity_weights(config: Config, tree: Tree) -> Sequence[float] | None:
    """Weights of the granularities; with `auto` only the finest of a tree counts."""
    if config.sampler.strides == "auto":
        return [float(stride == min(tree.strides)) for stride in tree.strides]
    return config.credit.granularity_weights


def latents_of(rollout: PromptRollout) -> dict[int, FloatArray]:
    """The latents that the learner needs, by node."""
    points = dict(zip(rollout.tree.branch_points.tolist(), rollout.trunk.latents, strict=True))
    below = (zip(unit.nodes.tolist(), unit.latents, strict=True) for unit in rollout.branches)
    return points | {node: latent for part in below for node, latent in part}


def _duplicates(tree: Tree, latents: Mapping[int, FloatArray]) -> int:
    """Number of nodes after branch points whose latent equals another node's."""
    points = set(tree.branch_points.tolist())
    made = [latent.flat[:64].tobytes() for node, latent in latents.items() if node not in points]  # enough to compare
    return len(made) - len(set(made))


def _log_probs(rollout: PromptRollout) -> FloatArray:
    """Log-probabilities [E] of the rollout."""
    log_prob = np.full(len(rollout.tree.source), np.nan, np.float32)
    for unit in rollout.branches:
        log_prob[unit.edges] = unit.log_prob
    return log_prob


class EdgeLoss:
    """The loss of an optimizer step's states, with one velocity for each state and all of its edges."""

    def __init__(self, config: Config, model: FlowModel, transformer: torch.nn.Module, sigmas: Tensor, copies: Copies):
        """`transformer` is the module with the LoRA, which `model` may call through a wrapper."""
        self._config, self._learner, self._sampler = config, config.learner, config.sampler
        self._model, self._transformer, self._sigmas, self._copies = model, transformer, sigmas, copies

    @torch.no_grad()
    def prepare(
        self, states: Mapping[StepKey, list[State]], batch: BatchShape, metrics: RankMetrics
    ) -> Mapping[StepKey, list[State]]:
        """The states with `old`, the edges under the sampling policy, for optimizer steps after the first.

        It uses the micro-batches of the update, so that both round equally, and adds mismatches to `metrics`.
        """
        if not self._learner.evaluates_old:
            return states
        policy = lora_replaced(self._transformer, self._copies.old) if self._copies.old else nullcontext()
        with policy:
            return {step.key: self._with_old(states[step.key], step, metrics) for step in batch.steps}

    def _with_old(self, states: list[State], step: StepShape, metrics: RankMetrics) -> list[State]:
        if step.fresh:
            return states
        found = []
        for some in micro_batches(states, self._learner.micro_batch, step):
            x, sigma, velocity = self._inputs(some)
            for at, (state, v) in enumerate(zip(some, velocity(x, sigma).split(1), strict=True)):
                old = self._rescored(state, x[at, None], v)
                metrics.observe(self._mismatch(state, v, old))
                kept = None if old.mean is None else old.mean.cpu()
                found.append(replace(state, old=Old(old.log_prob.cpu(), old.std, kept)))
        return found

    def __call__(self, states: Sequence[State], step: StepShape, metrics: RankMetrics) -> list[Part]:
        """(part of the loss, metrics) of each state, divided by the step's number of edges."""
        x, sigma, velocity = self._inputs(states)
        reference: Sequence[Tensor | None] = [None] * len(states)
        if self._learner.kl_beta > 0:
            with torch.no_grad(), lora_disabled(self._transformer):
                reference = velocity(x, sigma).split(1)
        v = velocity(x, sigma)
        subpaths = [self._subpath(velocity, states, x, v, parts) for parts in self._learner.subpaths]
        parts = []
        for at, state in enumerate(states):
            own = self._rescored(state, x[at, None], v[at, None].detach())
            if step.fresh:
                metrics.observe(self._mismatch(state, v[at, None].detach(), own))
            old = state.old or own
            if self._learner.old_log_prob == "rollout":
                old = self._sampled(state, own.std)
            along = [path[at] for path in subpaths]
            parts.append(self._state_loss(state, old, x[at, None], v[at, None], reference[at], along, step.edges))
        return parts

    def log_probs(self, state: State) -> Tensor:
        """Log-probabilities [e] of a state's edges, with gradient."""
        x, sigma, velocity = self._inputs([state])
        log_prob = self._step(state, x, velocity(x, sigma)).log_prob
        assert log_prob is not None
        return log_prob

    def _inputs(self, states: Sequence[State]) -> tuple[Tensor, Tensor, Velocity]:
        """x [n, L, D] and σ [n] of the states, and the velocity function for their prompts."""
        x = self._on_device(np.stack([state.latent for state in states]))
        sigma = self._sigmas[[state.start for state in states]].to(x)
        embeddings = [state.rollout.embedding for state in states]
        negative = negatives(embeddings) if self._sampler.guidance else None
        conditioning = self._model.condition(embeddings, negative)
        return x, sigma, lambda x, sigma: self._model.velocity(x, sigma, conditioning)

    def _on_device(self, array: FloatArray) -> Tensor:
        return torch.tensor(array, device=self._model.device)

    def _step(self, state: State, x: Tensor, velocity: Tensor) -> Transition:
        """The rescored step of the state's edges from x [1, L, D] by its velocity [1, L, D]."""
        next_x, sampler = self._on_device(state.next_latents), self._sampler
        step = transition(
            sampler.kernel, x, velocity, self._sigmas, state.start, sampler.eta, next_index=state.end, next_x=next_x
        )
        assert step.log_prob is not None  # the configuration ensures eta > 0 and noise in trained steps
        return step

    def _rescored(self, state: State, x: Tensor, velocity: Tensor) -> Old:
        step = self._step(state, x, velocity)
        assert step.log_prob is not None
        return Old(step.log_prob, step.std, step.mean if needs_drift(self._learner.objective) else None)

    def _sampled(self, state: State, std: float) -> Old:
        """The edges as the rollout computed them; the mean follows from their noise, which its key reproduces."""
        log_prob = self._on_device(state.log_prob)
        if not needs_drift(self._learner.objective):
            return Old(log_prob, std, None)
        keys = [edge_key(self._config, state.rollout, state.rollout.tree, int(edge)) for edge in state.edges]
        noise = torch.stack([self._model.initial_noise(generator(*key)) for key in keys]).to(log_prob)
        return Old(log_prob, std, self._on_device(state.next_latents) - std * noise)

    def _mismatch(self, state: State, velocity: Tensor, old: Old) -> dict[str, Tensor]:
        """Differences between rollout and learner at a state, under the same policy: see docs/exactness.md."""
        found: dict[str, Tensor] = {}
        if state.velocity is not None:
            found["velocity"] = relative_error(velocity, self._on_device(state.velocity)[None])
        sampled, valid = self._sampled(state, old.std), state.valid.to(velocity.device)
        std, objective = torch.full_like(old.log_prob, old.std), self._learner.objective
        drift = None if old.mean is None or sampled.mean is None else mean_shift(old.mean, sampled.mean, old.std)
        ratio = edge_ratios(objective, old.log_prob, sampled.log_prob, std=std, drift=drift)
        advantage, clip = state.advantage.to(ratio), self._learner.clip_range
        lost = cut_off(objective, ratio, advantage, clip_range=clip, drift=drift)
        return found | {"log_prob": (old.log_prob - sampled.log_prob).abs()[valid], "lost_edges": lost[valid]}

    def _state_loss(
        self,
        state: State,
        old: Old,
        x: Tensor,
        velocity: Tensor,
        reference: Tensor | None,
        subpaths: Sequence[tuple[Tensor, Tensor, float]],
        denominator: int,
    ) -> Part:
        """Loss and metrics of the edges that start at x [1, L, D] with velocity [1, L, D], over the denominator."""
        new, learner = self._step(state, x, velocity), self._learner
        assert new.log_prob is not None
        advantage, valid = state.advantage.to(x), state.valid.to(x.device)
        std = torch.full_like(new.log_prob, new.std)
        weight = self._edge_weight(state, std)
        loss, metrics = policy_loss(
            learner.objective,
            new.log_prob,
            old.log_prob.to(x),
            advantage,
            clip_range=learner.clip_range,
            valid=valid,
            denominator=denominator,
            weight=weight,
            std=std,
            drift=None if old.mean is None else mean_shift(new.mean, old.mean.to(x), new.std).expand_as(std),
            delta=torch.full_like(std, float(self._sigmas[state.end] - self._sigmas[state.start])),
        )
        for along in subpaths:
            losses = self._along(state, along, advantage)
            losses = losses if weight is None else weight * losses
            loss = loss + torch.where(valid, losses, 0).sum() / denominator / len(subpaths)
        metrics["kl"] = torch.zeros_like(loss)
        if reference is not None:
            base = self._step(state, x, reference)
            kl = mean_shift(new.mean, base.mean, new.std)[0] * valid.sum() / denominator
            loss = loss + learner.kl_beta * kl
            metrics["kl"] = kl.detach()
        metrics["loss"] = loss.detach()
        return loss, metrics

    def _edge_weight(self, state: State, std: Tensor) -> Tensor | None:
        """Of the edges with these deviations [N], `learner.edge_weight`; None: all alike."""
        weight = self._learner.edge_weight
        if weight == "time":
            start, end, first = (float(self._sigmas[at]) for at in (state.start, state.end, 1))
            return torch.full_like(std, time_weight(start, end, first))
        return None if weight is None else weight * std

    def _along(self, state: State, subpath: tuple[Tensor, Tensor, float], advantage: Tensor) -> Tensor:
        """Losses [e] of the edges from the last state of a subpath."""
        x, v, sigma = subpath
        end, first = float(self._sigmas[state.end]), float(self._sigmas[1])
        next_x, sampler = self._on_device(state.next_latents), self._sampler
        path = step_between(sampler.kernel, x[None], v[None], sigma, end, sampler.eta, first=first, next_x=next_x)
        assert path.log_prob is not None
        return edge_losses("reinforce", path.log_prob, path.log_prob, advantage, clip_range=0.0)

    def _subpath(
        self, velocity: Velocity, states: Sequence[State], x: Tensor, v: Tensor, parts: int
    ) -> list[tuple[Tensor, Tensor, float]]:
        """(x [L, D], velocity [L, D], sigma) of each state after all but the last of `parts` ODE substeps.

        The substeps are even in sigma. Gradients flow through all of them (Pave-GRPO).
        """
        start, end = (self._sigmas[[getattr(s, side) for s in states]].to(x) for side in ("start", "end"))
        delta = (end - start) / parts
        sigma = start
        for number in range(1, parts):
            x = x + delta.view(-1, *[1] * (x.ndim - 1)) * v
            sigma = start + number * delta
            v = velocity(x, sigma)
        return list(zip(x, v, sigma.tolist(), strict=True))
