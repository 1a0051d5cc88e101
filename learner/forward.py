"""Losses of the forward process: images with new noise, and the velocity there weighted by their advantages.

an image's x0, (t, ε) by the key of its prompt, place and draw ─► x_t ─► v, v_old, v of the base ─► objective
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rpo_ray.algo.forward import AWM, awm_log_probs, nft_losses, noise_levels, renoised, stratified, velocity_shift
from g2rpo_ray.algo.objectives import policy_loss
from g2rpo_ray.config import Config
from g2rpo_ray.learner.agreement import Agreement
from g2rpo_ray.learner.batch import BatchShape, Part, RankMetrics, StepShape
from g2rpo_ray.learner.copies import Copies
from g2rpo_ray.models import FlowModel, lora_disabled, lora_replaced, negatives
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import StepKey, image_key, state_places
from g2rpo_ray.types import FloatArray, PromptRollout


@dataclass(frozen=True, slots=True)
class ImageState:
    """A draw of an image. Its noise is drawn when its velocity is evaluated."""

    rollout: PromptRollout
    node: int
    draw: int
    latent: FloatArray  # x0 [L, D]
    place: float  # quantile of t in its distribution
    advantage: Tensor  # [1], of the last edge before the image
    valid: Tensor  # [1] bool


def image_states(
    config: Config,
    rollout: PromptRollout,
    prompts: int,
    latents: Mapping[int, FloatArray],
    advantage: Tensor,
    scored: Tensor,
) -> Iterator[tuple[StepKey, ImageState]]:
    """The states of a prompt, each with its optimizer step, from its images' latents and edges' advantages [E]."""
    name = ("level", config.seed, rollout.iteration, rollout.slot, rollout.prompt)
    images = rollout.tree.trained_images.tolist()
    places = stratified(len(images), [generator(*name, draw) for draw in range(config.learner.draws)])
    for key, node, edges, draw in state_places(rollout.tree, rollout.slot, prompts, config.learner):
        place = float(places[draw, images.index(node)])
        yield key, ImageState(rollout, node, draw, latents[node], place, advantage[edges], scored[edges])


class ForwardLoss:
    """The loss of an optimizer step's draws of images."""

    def __init__(self, config: Config, model: FlowModel, transformer: torch.nn.Module, sigmas: Tensor, copies: Copies):
        """`transformer` is the module with the LoRA, which `model` may call through a wrapper."""
        self._config, self._learner, self._copies = config, config.learner, copies
        self._model, self._transformer, self._sigmas = model, transformer, sigmas
        self._agreement = Agreement(config, model, transformer, sigmas, copies)

    def prepare(
        self, states: Mapping[StepKey, list[ImageState]], batch: BatchShape, metrics: RankMetrics
    ) -> Mapping[StepKey, list[ImageState]]:
        """The states unchanged; adds the error of one velocity per prompt to `metrics`."""
        prompts = {state.rollout.slot: state.rollout for some in states.values() for state in some}
        self._agreement.observe_velocities(list(prompts.values()), batch.prompts, metrics)
        return states

    def _velocity(self, rollouts: Sequence[PromptRollout], x: Tensor, t: Tensor) -> Callable[[], Tensor]:
        """A function to the velocity [N, ...] at x [N, ...] and t [N] for the prompts of N rollouts."""
        embeddings = [rollout.embedding for rollout in rollouts]
        negative = negatives(embeddings) if self._config.sampler.guidance else None
        conditioning = self._model.condition(embeddings, negative)
        return lambda: self._model.velocity(x, t, conditioning)

    def __call__(self, states: Sequence[ImageState], step: StepShape, metrics: RankMetrics) -> list[Part]:
        """(part of the loss, metrics) of each state, divided by the step's number of edges."""
        device = self._model.device
        x0 = torch.stack([torch.tensor(state.latent) for state in states]).to(device)
        noise = torch.stack([self._noise(state) for state in states]).to(device)
        places = torch.tensor([state.place for state in states], dtype=torch.float64)
        t = noise_levels(self._learner.times, places, self._sigmas, self._config.sampler.untrained).to(device)
        x = renoised(x0, noise, t)
        velocity = self._velocity([state.rollout for state in states], x, t)
        base, old, average = self._others(velocity)
        v = velocity()
        old = v.detach() if old is None else old
        advantage, valid = (torch.cat([getattr(s, name) for s in states]).to(device) for name in ("advantage", "valid"))
        parts = self._objective(x0, x, noise, t, v, old, advantage, valid, step.edges)
        penalties = {"kl": (base, self._learner.kl_beta), "old_kl": (average, self._learner.old_kl)}
        for name, (other, beta) in {**penalties, "old_shift": (old, 0.0)}.items():
            shift = torch.zeros_like(t) if other is None else velocity_shift(v, other) * valid / step.edges
            parts = [
                (loss + beta * shift[at], {**metrics, name: shift[at].detach()})
                for at, (loss, metrics) in enumerate(parts)
            ]
        return [(loss, {**metrics, "loss": loss.detach()}) for loss, metrics in parts]

    def _others(self, velocity: Callable[[], Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Velocities of the model without LoRA, of the sampling policy and of the average; None if not needed."""
        base = None
        with torch.no_grad():
            if self._learner.kl_beta > 0:
                with lora_disabled(self._transformer):
                    base = velocity()
            return base, self._by(self._copies.old, velocity), self._by(self._copies.average, velocity)

    def _by(self, state: Mapping[str, Tensor] | None, velocity: Callable[[], Tensor]) -> Tensor | None:
        """The velocity of another policy, if there is one."""
        if state is None:
            return None
        with lora_replaced(self._transformer, state):
            return velocity()

    def _objective(
        self, x0: Tensor, x: Tensor, noise: Tensor, t: Tensor, v: Tensor, old: Tensor, advantage: Tensor, valid: Tensor,
        total: int,
    ) -> list[Part]:  # fmt: skip
        """(part of the loss, metrics) of each state by the objective, without penalties."""
        learner = self._learner
        if learner.objective == "nft":
            clip = self._config.credit.clip
            losses = nft_losses(x0, x, t, v, old, advantage, beta=learner.nft_beta, clip=clip)
            return [(loss, {}) for loss in torch.where(valid, losses, 0) / total]
        log_probs = [awm_log_probs(AWM[learner.objective], x0, noise, t, velocity) for velocity in (v, old)]
        each = zip(*(tensor.split(1) for tensor in (*log_probs, advantage, valid)), strict=True)
        return [
            policy_loss("clip", new, before, a, clip_range=learner.clip_range, valid=there, denominator=total)
            for new, before, a, there in each
        ]

    def _noise(self, state: ImageState) -> Tensor:
        key = image_key(self._config, state.rollout, state.rollout.tree, state.node, state.draw)
        return self._model.initial_noise(generator(*key))
