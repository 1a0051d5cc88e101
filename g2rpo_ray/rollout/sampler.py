"""What a rollout worker does with a work unit: anchors, branches, held-out samples. No Ray here."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo import Velocity, complete, run_anchor, transition
from g2rpo_ray.config import Config
from g2rpo_ray.models import FluxModel, add_lora, fold_lora, load_lora, lora_disabled, one_prompt
from g2rpo_ray.rollout.decoder import Decoder
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import branch_plan, sigma_grid
from g2rpo_ray.types import Anchor, AnchorUnit, Branches, BranchUnit, FloatArray, Images, PromptEmbedding, SampleUnit


class Sampler:
    """The frozen model with its LoRA, and the three things it is asked for.

    What a unit gives depends on the unit, the weights and the configuration alone: the noise is keyed by what it is
    for, and the batches are fixed by `rollout.micro_batch`.
    """

    def __init__(self, config: Config, model: FluxModel | None = None):
        """`model`: one that is loaded already, without LoRA."""
        self._config = config
        self._device = config.rollout.device
        self._model = model or FluxModel.load(config.model, self._device, transformer=True, vae=True)
        add_lora(self._model.transformer, config.lora, config.seed)
        fold_lora(self._model.transformer)
        if config.rollout.compile:  # dynamic: the last batches of a unit are smaller than the others
            self._model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        self._sigmas = sigma_grid(config.sampler, self._model.image_tokens)
        self._plan = branch_plan(config.sampler)
        self._decoder = Decoder(config, self._model)
        self.evaluations = 0
        """Velocity evaluations since the start, a latent each."""

    def load_weights(self, state: Mapping[str, np.ndarray]) -> None:
        load_lora(self._model.transformer, state)

    @torch.inference_mode()
    def anchor(self, unit: AnchorUnit, embedding: PromptEmbedding) -> tuple[Anchor, Images]:
        """The trajectory at the branch steps, and the image [1, H, W, 3] at its end: T evaluations."""
        x = self._initial("anchor", self._config.seed, unit.iteration, unit.slot, unit.prompt)
        with self._velocity(embedding) as velocity:
            trajectory = run_anchor(velocity, x[None], self._sigmas, self._config.sampler.branch_steps)
        anchor = Anchor(_array(trajectory.latents[:, 0]), _array(trajectory.velocities[:, 0]))
        return anchor, self._decode(trajectory.final)

    @torch.inference_mode()
    def branch(self, unit: BranchUnit, embedding: PromptEmbedding, anchor: Anchor) -> tuple[Branches, Images]:
        """One stochastic step from the anchor for each member, and the images [J · G', H, W, 3] by granularity."""
        sampler = self._config.sampler
        place = sampler.branch_steps.index(unit.branch_step)
        x, v = (torch.tensor(a[place], device=self._device) for a in (anchor.latents, anchor.velocities))
        key = (self._config.seed, unit.iteration, unit.slot, unit.prompt, unit.branch_step)
        members = range(unit.first_member, unit.first_member + unit.members)
        noise = torch.stack([self._initial("branch", *key, member) for member in members])
        step = transition(sampler.kernel, x[None], v[None], self._sigmas, unit.branch_step, sampler.eta, noise=noise)
        assert step.log_prob is not None
        paths = self._plan.paths(unit.branch_step)
        decoding = self._decoder.unit(len(paths) * unit.members)
        with self._velocity(embedding) as velocity:
            complete(velocity, step.next_x, paths, self._sigmas, self._config.rollout.micro_batch, decoding.ended)
        return Branches(_array(step.next_x), _array(step.log_prob)), decoding.images()

    @torch.inference_mode()
    def sample(self, unit: SampleUnit, embedding: PromptEmbedding) -> Images:
        """Deterministic samples [seeds, H, W, 3]; the noise depends on prompt and seed alone, not on the steps."""
        x = torch.stack([self._initial("sample", seed, unit.prompt) for seed in unit.seeds])
        parts = x.split(self._config.rollout.micro_batch)
        return self._decode(torch.cat([self._integrate(unit, embedding, part) for part in parts]))

    def _integrate(self, unit: SampleUnit, embedding: PromptEmbedding, x: Tensor) -> Tensor:
        """The latents at the last step, of noise [seeds, L, D]."""
        sigmas = self._sigmas
        if unit.steps is not None:
            sigmas = sigma_grid(self._config.sampler.model_copy(update={"steps": unit.steps}), self._model.image_tokens)
        steps = len(sigmas) - 1
        adapted = math.floor(unit.adapter_share * steps + 0.5)
        with self._velocity(embedding) as velocity:
            x = run_anchor(velocity, x, sigmas[: adapted + 1]).final
        if adapted == steps:
            return x
        with lora_disabled(self._model.transformer), self._velocity(embedding) as velocity:
            return run_anchor(velocity, x, sigmas[adapted:]).final

    def _initial(self, *key: int | str) -> Tensor:
        return self._model.initial_noise(generator(*key)).to(self._device)

    @contextmanager
    def _velocity(self, embedding: PromptEmbedding) -> Iterator[Velocity]:
        """The velocity for one prompt; what depends on the prompt or the resolution alone is evaluated once."""
        conditioning = self._model.condition([embedding])

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            self.evaluations += len(x)
            return self._model.velocity(x, sigma, conditioning)

        with one_prompt(self._model.transformer):
            yield velocity

    def _decode(self, x: Tensor) -> Images:
        decoding = self._decoder.unit(len(x))
        decoding.ended(range(len(x)), x)
        return decoding.images()


def _array(tensor: Tensor) -> FloatArray:
    return tensor.float().cpu().numpy()
