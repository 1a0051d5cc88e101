"""The work of a rollout actor on a unit: trunks, branches, held-out samples. No Ray."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo.growth import Velocity, grow, integrate
from g2rpo_ray.algo.tree import Tree
from g2rpo_ray.config import Config
from g2rpo_ray.models import (
    FlowModel,
    add_lora,
    compile_blocks,
    fold_lora,
    load_lora,
    lora_disabled,
    one_prompt,
    quantize,
)
from g2rpo_ray.rollout.decoder import Decoder
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import branch_part, edge_key, prompt_tree, trunk_part
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import Branches, BranchUnit, FloatArray, Images, PromptEmbedding, SampleUnit, Trunk, TrunkUnit

Units = Literal["all", "exact", "completions"]


class Sampler:
    """The frozen model with its LoRA, which computes trunks, branches and held-out samples.

    A unit's result depends only on the unit, the weights and the configuration: noise has a key for each use, and
    `rollout.micro_batch` fixes the batches.
    """

    def __init__(self, config: Config, model: FlowModel | None = None, units: Units = "all"):
        """
        Args:
            model: a loaded one without LoRA. Default: load the configuration's.
            units: the only units that it computes: all but cheap completions (`exact`), these alone, or all.
        """
        self._config = config
        given = config.rollout.completions
        device = given.device if units == "completions" else config.rollout.device
        if units == "completions" and given.need_weights:
            self._model = self.completing = _completing(config, device, alone=True)
        else:
            self._model = model or FlowModel.load(config.rollout_model, device, transformer=True, vae=True)
            _prepare(self._model, config, config.rollout.compile)
            self.completing = self._model
        if units == "all" and given.need_weights:
            self.completing = _completing(config, device, alone=False)
            self.completing.low_noise = self._model.low_noise
        self._sigmas = sigma_grid(config.sampler, self._model)
        self._device = self._model.device
        self._decoder = Decoder(config, self._model)
        self.evaluations = 0
        """Velocity evaluations since the start, counted per latent."""

    def load_weights(self, state: Mapping[str, np.ndarray]) -> None:
        """Loads a LoRA, arrays by name."""
        for model in {self._model, self.completing}:
            load_lora(model.transformer, state)

    @torch.inference_mode()
    def trunk(self, unit: TrunkUnit, embedding: PromptEmbedding) -> tuple[Trunk, Images]:
        """The trunks at their branch points, and with `evaluation.anchors` their images uint8 [I, H, W, 3]."""
        tree = self._tree(unit)
        part, roots = trunk_part(tree), range(self._config.sampler.roots)
        key = (self._config.seed, unit.iteration, unit.slot, unit.prompt)
        x = self._noise([("root", *key, root) for root in roots])
        decoding = self._decoder.unit(len(part.images))
        with self.velocity(embedding, self._config.sampler.guidance) as velocity:
            grown = grow(
                velocity, tree, part.nodes, roots, x, self._sigmas, keep=part.touched,
                micro_batch=self._config.rollout.micro_batch, ended=decoding.ended,
            )  # fmt: skip
        return Trunk(_array(grown.latents), _array(grown.velocities)), decoding.images()

    @torch.inference_mode()
    def branch(self, unit: BranchUnit, embedding: PromptEmbedding, trunk: Trunk) -> tuple[Branches, Images]:
        """The children's stochastic edges, and the images uint8 [I, H, W, 3] below them, in the order of nodes."""
        tree, sampler = self._tree(unit), self._config.sampler
        part = branch_part(tree, unit, self._config.learner.forward)
        points = [place for place, node in enumerate(tree.branch_points) if node in set(tree.source[part.edges])]
        x, v = (torch.tensor(a[points], device=self._device) for a in (trunk.latents, trunk.velocities))

        def noise(edges: Sequence[int]) -> Tensor:
            return self._noise([edge_key(self._config, unit, tree, edge) for edge in edges])

        decoding = self._decoder.unit(len(part.images))
        model, rollout = self._model if unit.exact else self.completing, self._config.rollout
        with self.velocity(embedding, sampler.guidance, model) as velocity:
            grown = grow(
                velocity, tree, part.nodes, tree.branch_points[points].tolist(), x, self._sigmas, v=v,
                kernel=sampler.kernel, eta=sampler.eta, noise=noise, keep=part.touched,
                micro_batch=rollout.micro_batch if unit.exact else rollout.completions_batch, ended=decoding.ended,
            )  # fmt: skip
        nodes, edges = np.array(part.touched, np.int64), np.array(part.edges, np.int64)
        return Branches(nodes, _array(grown.latents), edges, _array(grown.log_prob)), decoding.images()

    @torch.inference_mode()
    def sample(self, unit: SampleUnit, embedding: PromptEmbedding) -> Images:
        """Deterministic samples uint8 [seeds, H, W, 3]. The noise depends only on prompt and seed."""
        x = self._integrate(unit, embedding, self._noise([("sample", seed, unit.prompt) for seed in unit.seeds]))
        decoding = self._decoder.unit(len(x))
        decoding.ended(range(len(x)), x)
        return decoding.images()

    def _integrate(self, unit: SampleUnit, embedding: PromptEmbedding, x: Tensor) -> Tensor:
        """The latents at the last step, from noise [seeds, L, D]."""
        sigmas = self._sigmas
        if unit.steps is not None:
            sigmas = sigma_grid(self._config.sampler.model_copy(update={"steps": unit.steps}), self._model)
        steps = len(sigmas) - 1
        adapted = math.floor(unit.adapter_share * steps + 0.5)
        guided = self._config.evaluation.guidance
        with self.velocity(embedding, guided) as velocity:
            x = integrate(self._in_batches(velocity), x, sigmas[: adapted + 1])
        if adapted == steps:
            return x
        with lora_disabled(self._model.transformer), self.velocity(embedding, guided) as velocity:
            return integrate(self._in_batches(velocity), x, sigmas[adapted:])

    def _in_batches(self, velocity: Velocity) -> Velocity:
        size = self._config.rollout.micro_batch
        return lambda x, s: torch.cat([velocity(*rows) for rows in zip(x.split(size), s.split(size), strict=True)])

    def _tree(self, unit: TrunkUnit | BranchUnit) -> Tree:
        return prompt_tree(self._config, unit.iteration, unit.slot, unit.prompt, unit.choice)

    def _noise(self, keys: Sequence[tuple[int | str, ...]]) -> Tensor:
        """Noise [len(keys), ...], copied from pinned memory without waiting for earlier velocities."""
        noise = torch.stack([self._model.initial_noise(generator(*key)) for key in keys])
        return (noise.pin_memory() if self._device == "cuda" else noise).to(self._device, non_blocking=True)

    @contextmanager
    def velocity(self, embedding: PromptEmbedding, guided: bool, model: FlowModel | None = None) -> Iterator[Velocity]:
        """The velocity for one prompt. Tensors that depend only on the prompt or the resolution are computed once."""
        model = model or self._model
        negative = embedding.negative if guided else None
        conditioning = model.condition([embedding], negative)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            self.evaluations += len(x) * (1 if negative is None else 2)
            return model.velocity(x, sigma, conditioning)

        with one_prompt(model.transformer) if negative is None else nullcontext():
            yield velocity


def _prepare(model: FlowModel, config: Config, compiled: bool) -> None:
    add_lora(model.transformer, config.lora, config.seed)
    fold_lora(model.transformer)
    if compiled:
        compile_blocks(model.transformer)


def _completing(config: Config, device: str, alone: bool) -> FlowModel:
    """The model of `rollout.completions`; `alone`: with all that no other model of its process has."""
    given = config.rollout.completions
    model = FlowModel.load(
        config.completions_model, device, transformer=True, vae=alone, low_noise=alone, weights_on="cpu"
    )
    _prepare(model, config, compiled=False)
    if given.quantization != "none":
        quantize(model.transformer, given.quantization, device)
    model.move(device)
    if given.compile:
        compile_blocks(model.transformer)
    return model


def _array(tensor: Tensor) -> FloatArray:
    return tensor.float().cpu().numpy()
