"""What a rollout worker does with a work unit: anchors, branches, held-out samples. No Ray here."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo import Velocity, complete, run_anchor, transition
from g2rpo_ray.config import Config
from g2rpo_ray.models import Conditioning, FluxModel, add_lora, load_lora
from g2rpo_ray.noise import generator
from g2rpo_ray.plan import branch_plan, sigma_grid
from g2rpo_ray.types import Anchor, AnchorUnit, Branches, BranchUnit, FloatArray, Images, PromptEmbedding, SampleUnit


class Sampler:
    """The frozen model with its LoRA, and the three things it is asked for.

    What a unit gives depends on the unit, the weights and the configuration alone: the noise is keyed by what it is
    for, and the batches are fixed by `rollout.micro_batch`.
    """

    def __init__(self, config: Config):
        self._config = config
        self._device = config.rollout.device
        self._model = FluxModel.load(config.model, self._device, transformer=True, vae=True)
        add_lora(self._model.transformer, config.lora, config.seed)
        self._sigmas = sigma_grid(config.sampler, self._model.image_tokens)
        self._plan = branch_plan(config.sampler)
        self.evaluations = 0
        """Velocity evaluations since the start, a latent each."""

    def load_weights(self, state: Mapping[str, np.ndarray]) -> None:
        load_lora(self._model.transformer, state)

    @torch.inference_mode()
    def anchor(self, unit: AnchorUnit, embedding: PromptEmbedding) -> tuple[Anchor, Images]:
        """The trajectory at the branch steps, and the image [1, H, W, 3] at its end: T evaluations."""
        x = self._initial("anchor", self._config.seed, unit.iteration, unit.slot, unit.prompt)
        trajectory = run_anchor(self._velocity(embedding), x[None], self._sigmas, self._config.sampler.branch_steps)
        anchor = Anchor(_array(trajectory.latents[:, 0]), _array(trajectory.velocities[:, 0]))
        return anchor, self._decode(trajectory.final)

    @torch.inference_mode()
    def branch(self, unit: BranchUnit, embedding: PromptEmbedding, anchor: Anchor) -> tuple[Branches, Images]:
        """One stochastic step from the anchor for each member, and the images [J · G', H, W, 3] by granularity."""
        sampler = self._config.sampler
        place = sampler.branch_steps.index(unit.branch_step)
        x, velocity = (torch.tensor(a[place], device=self._device) for a in (anchor.latents, anchor.velocities))
        key = (self._config.seed, unit.iteration, unit.slot, unit.prompt, unit.branch_step)
        members = range(unit.first_member, unit.first_member + unit.members)
        noise = torch.stack([self._initial("branch", *key, member) for member in members])
        step = transition(
            sampler.kernel, x[None], velocity[None], self._sigmas, unit.branch_step, sampler.eta, noise=noise
        )
        assert step.log_prob is not None
        final = complete(
            self._velocity(embedding),
            step.next_x,
            self._plan.paths(unit.branch_step),
            self._sigmas,
            self._config.rollout.micro_batch,
        )
        return Branches(_array(step.next_x), _array(step.log_prob)), self._decode(final.flatten(0, 1))

    @torch.inference_mode()
    def sample(self, unit: SampleUnit, embedding: PromptEmbedding) -> Images:
        """Deterministic samples [seeds, H, W, 3]; the noise depends on prompt and seed alone."""
        x = torch.stack([self._initial("sample", seed, unit.prompt) for seed in unit.seeds])
        parts = x.split(self._config.rollout.micro_batch)
        final = [run_anchor(self._velocity(embedding), part, self._sigmas).final for part in parts]
        return self._decode(torch.cat(final))

    def _initial(self, *key: int | str) -> Tensor:
        return self._model.initial_noise(generator(*key)).to(self._device)

    def _velocity(self, embedding: PromptEmbedding) -> Velocity:
        conditioning: Conditioning = self._model.condition([embedding])

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            self.evaluations += len(x)
            return self._model.velocity(x, sigma, conditioning)

        return velocity

    def _decode(self, x: Tensor) -> Images:
        parts = [self._model.decode(part) for part in x.split(self._config.rollout.decode_batch)]
        return torch.cat(parts).numpy()


def _array(tensor: Tensor) -> FloatArray:
    return tensor.float().cpu().numpy()
