"""The work of each kind of actor at full size without data: shapes, dtypes and devices are checked, bytes are counted.

The actors' own code runs on PyTorch's meta device: a trunk unit, a branch unit, a micro-batch of the loss with its
backward pass, a text encoder.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from g2rpo_ray.allocations import Allocations, peak_bytes, tensor_bytes
from g2rpo_ray.config import Config
from g2rpo_ray.config.completions import CompletionsConfig
from g2rpo_ray.learner.batch import BatchShape, RankMetrics
from g2rpo_ray.learner.copies import Copies
from g2rpo_ray.learner.forward import ForwardLoss, image_states
from g2rpo_ray.learner.loss import EdgeLoss, edge_states, latents_of
from g2rpo_ray.messages import one_line
from g2rpo_ray.models import FlowModel, add_lora, fold_lora, lora_parameters
from g2rpo_ray.models.base import describe_model
from g2rpo_ray.models.estimate import LIBRARIES, rollout_memory, with_micro_batch
from g2rpo_ray.rollout.plan import branch_part, branch_units, prompt_tree
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import Branches, FloatArray, PromptEmbedding, PromptRollout, Trunk, TrunkUnit
from g2rpo_ray.without_data import META, without_data

TOKENS = 512  # of the longest prompt, where neither the settings nor a text encoder have a limit
DEVICES = (24, 48, 80)  # GB
GATHERED = 2 * 10**9  # approximate bytes of weights that a rank with ZeRO 3 gathers at once: DeepSpeed's default
TRAINED = 28  # bytes of a trained parameter, all float32: in the module, ZeRO's flat copy, gradient, its mean over the
# ranks, two moments, and AdamW's update
COPY = 4  # bytes of a parameter per other policy that the loss evaluates
UNIT = TrunkUnit(0, 0, "")


def full_size(config: Config) -> dict[str, dict[str, int]]:
    """Bytes on its device, by category, of each kind of actor with the configuration's own batches.

    The encoder's are known where the configurations of the text encoders are on this machine.

    Raises:
        ValueError: one line; a unit, a decoding or a backward pass fails at this size.
    """
    learner, completions = config.learner, config.rollout.completions
    with _errors_in_a_line(config):
        rank = learner_memory(config, learner.micro_batch, learner.gradient_checkpointing)
        found = {"rollout actor": actor_memory(config), "learner rank": rank}
        if completions.apart:
            found["completions actor"] = actor_memory(config, "completions")
    if learner.zero_stage == 3:
        rank["weights"] = rank["weights"] // learner.ranks + GATHERED
    if encoder := encoder_memory(config):
        found["encoder"] = encoder
    return found


@contextmanager
def _errors_in_a_line(config: Config) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a user's own model, kernel or objective may raise any
        raise ValueError(f"model.path: {config.model.path} fails at full size: {one_line(error, 400)}") from None


def actor_memory(config: Config, units: str = "all") -> dict[str, int]:
    """Bytes of an actor for these units (see `Sampler`), as by `rollout_memory`, with whole units for a velocity."""
    memory, completions = rollout_memory(config, units), config.rollout.completions
    cheap = units == "completions" or not completions.apart  # else the branch units are exact probes
    branches = config.rollout.completions_batch if cheap else config.rollout.micro_batch
    peaks = [unit_memory(with_micro_batch(config, branches), branch=True)]
    if units == "all":
        peaks.append(unit_memory(config, branch=False))
    return {
        "weights": memory["weights"],
        "units": max(peak["units"] for peak in peaks),
        "decode": max(memory["decode"], *(peak["decode"] for peak in peaks)),
    }


def unit_memory(config: Config, branch: bool) -> dict[str, int]:
    """Peaks of the bytes of a trunk unit's or a branch unit's tensors: of decoding, which runs beside the next
    evaluations, and of all else."""
    plain = {"compile": False, "completions": CompletionsConfig()}
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=plain)})
    tree = prompt_tree(config, UNIT.iteration, UNIT.slot, UNIT.prompt)
    with without_data():
        model = _skeleton(config)
        sampler, embedding = Sampler(config, model), longest_prompt(config, model)
        with Allocations("units") as allocations:
            model.decode = allocations.apart("decode", model.decode)  # type: ignore[method-assign]
            if branch:
                shape = (len(tree.branch_points), *model.latent_shape)
                units = list(branch_units(config, tree, UNIT))
                sampler.branch(units[0], embedding, Trunk(_zeros(shape), _zeros(shape)))
            else:
                sampler.trunk(UNIT, embedding)
    return allocations.peaks


def learner_memory(config: Config, states: int, checkpointed: bool) -> dict[str, int]:
    """Bytes on a rank's device: `weights` (frozen), `adapter` (with its optimizer), and the peak of the tensors of the
    loss of so many states and its backward pass."""
    learner = config.learner
    with without_data():
        model = _skeleton(config)
        weights = tensor_bytes(model.transformer)
        add_lora(model.transformer, config.lora, seed=0)
        fold_lora(model.transformer)
        if checkpointed:
            model.enable_gradient_checkpointing()
        lora = lora_parameters(model.transformer)
        copies = _copies(config, {name: parameter.detach() for name, parameter in lora.items()})
        rollout, metrics = _rollout(config, model), RankMetrics()
        step = BatchShape.of([[rollout]], learner).steps[0]
        edges = len(rollout.tree.source)
        made: Iterator[tuple[Any, Any]] = (image_states if learner.forward else edge_states)(
            config, rollout, 1, latents_of(rollout), torch.zeros(edges), torch.ones(edges, dtype=torch.bool)
        )
        some = list(itertools.islice((state for _, state in made), states))  # a few: they are on the host
        some = list(itertools.islice(itertools.cycle(some), states))
        kind = ForwardLoss if learner.forward else EdgeLoss
        loss = kind(config, model, model.transformer, sigma_grid(config.sampler, model), copies)

        def backward() -> None:
            losses, _ = zip(*loss(some, step, metrics), strict=True)
            torch.stack(losses).sum().backward()

        passes = peak_bytes(backward)
    trained = sum(parameter.numel() for parameter in lora.values())
    others = sum(copy is not None for copy in (copies.old, copies.average))
    return {"weights": weights, "adapter": (TRAINED + COPY * others) * trained, "states": passes}


def _copies(config: Config, lora: dict[str, torch.Tensor]) -> Copies:
    """The policies beside the LoRA that the loss evaluates: the sampling policy, if it differs, and an average."""
    learner, stale = config.learner, config.rollout.max_staleness > 0
    another = learner.forward or (stale and learner.evaluates_old)
    averaged = learner.forward and learner.old_kl > 0
    return Copies(learner, META, True, {}, {}, old=lora if another else None, average=lora if averaged else None)


def _rollout(config: Config, model: FlowModel) -> PromptRollout:
    """A prompt's rollout as the learner receives it, with zeros for latents and scores."""
    tree = prompt_tree(config, UNIT.iteration, UNIT.slot, UNIT.prompt)

    def zeros(number: int) -> FloatArray:
        return _zeros((number, *model.latent_shape))

    branches = []
    for unit in branch_units(config, tree, UNIT):
        part = branch_part(tree, unit, config.learner.forward)
        nodes, edges = np.array(part.touched, np.int64), np.array(part.edges, np.int64)
        branches.append(Branches(nodes, zeros(len(nodes)), edges, _zeros((len(edges),))))
    points = len(tree.branch_points)
    scores = np.zeros((len(config.credit_weights), len(tree.leaf)), np.float32)
    trunk, embedding = Trunk(zeros(points), zeros(points)), longest_prompt(config, model)
    return PromptRollout(0, 0, UNIT.prompt, tree, scores, embedding, trunk, tuple(branches))


def _skeleton(config: Config) -> FlowModel:
    """The model without data, and with zeros for noise, which is drawn on the host."""
    model = FlowModel.skeleton(config.model)
    model.initial_noise = lambda generator: torch.zeros(()).expand(model.latent_shape)  # type: ignore[method-assign]
    return model


def _zeros(shape: tuple[int, ...]) -> FloatArray:
    return np.broadcast_to(np.float32(0), shape)


def longest_prompt(config: Config, model: FlowModel) -> PromptEmbedding:
    """An embedding of the longest prompt, and of a negative prompt if velocities are guided."""
    embedding = model.random_embedding(UNIT.prompt, torch.Generator())
    return replace(embedding, negative=embedding) if config.velocity_cost > 1 else embedding


def encoder_memory(config: Config) -> dict[str, int]:
    """Bytes on the encoder's device: `weights` of the text encoders, and the peak of the tensors of an `encoding` of
    the longest prompt by one of them. Empty if their configurations are not on this machine."""
    source, length = Path(config.model.location), config.model.max_sequence_length or TOKENS
    index = json.loads((source / "model_index.json").read_text())
    weights, peaks = 0, [0]
    for name in describe_model(config.model)[1].text_parts:
        if (source / name / "config.json").is_file() and name.startswith("text_encoder"):
            kind = getattr(transformers, index[name][1])
            settings = kind.config_class.from_pretrained(source / name)
            most = getattr(settings.get_text_config(), "max_position_embeddings", length)
            with without_data(), torch.device(META), torch.inference_mode():
                encoder = kind(settings).to(getattr(torch, config.model.dtype))
                ids = torch.zeros(1, min(length, most), dtype=torch.long)
                peaks.append(peak_bytes(partial(encoder, ids, output_hidden_states=True)))
            weights += tensor_bytes(encoder)
    return {"weights": weights, "encoding": max(peaks)} if weights else {}


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest batches on a device of this many GB (10^9 bytes), by estimate; 0 if none fits."""

    gigabytes: int
    latents: int  # of a rollout actor's largest micro-batch
    states: int  # of a learner rank's
    checkpointed: bool  # True if the learner needs gradient checkpointing
    zero_stage: int  # the lowest one that fits, with the configuration's ranks


def fits(config: Config) -> list[Fit]:
    """Fits on devices of common sizes; a rank without gradient checkpointing, else with it, else also with ZeRO 3.

    Raises:
        ValueError: one line; an evaluation or a backward pass fails without data.
    """
    with _errors_in_a_line(config):
        one, two = (sum(rollout_memory(with_micro_batch(config, n)).values()) for n in (1, 2))
        passes = {checkpointed: learner_memory(config, 1, checkpointed) for checkpointed in (False, True)}
    weights, adapter = passes[True]["weights"], passes[True]["adapter"]
    found = []
    for gigabytes in DEVICES:
        memory = gigabytes * 10**9 - LIBRARIES
        latents = max(0, 1 + (memory - one) // (two - one))
        for stage, checkpointed in ((1, False), (1, True), (3, True)):
            share = weights / config.learner.ranks + GATHERED if stage == 3 else weights
            states = max(0, int((memory - adapter - share) // passes[checkpointed]["states"]))
            if states:
                break
        found.append(Fit(gigabytes, latents, states, checkpointed, stage))
    return found
