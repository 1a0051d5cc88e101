"""Cost of a run: velocity evaluations of rollouts and updates, and bytes in the object store.

A rollout costs its evaluations. A learner state costs 3 evaluations, forward and backward, or 4 with gradient
checkpointing, and 1 for each further policy.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from g2rpo_ray.algo.completion import Choice
from g2rpo_ray.algo.tree import Tree
from g2rpo_ray.config import Config
from g2rpo_ray.data import iteration_prompts
from g2rpo_ray.rollout.plan import (
    BACKWARD,
    branch_part,
    branch_units,
    in_order,
    possible_trees,
    prompt_tree,
    rollout_evaluations,
    state_places,
)
from g2rpo_ray.types import TrunkUnit

MAX_ITERATIONS = 1_000_000
LATENT_BYTES = 2  # of a float32 latent per pixel, for the family with the largest latents, FLUX.2
RANK_BYTES = 8 * 2**20  # of a LoRA per rank, on a model of FLUX.1's size
OTHER_BYTES = 10**9  # embeddings, held-out images


def learner_states(config: Config, tree: Tree) -> int:
    """Number of velocities that the learner evaluates, forward and backward, for a prompt's tree."""
    if config.learner.forward:
        return len(tree.trained_images) * config.learner.draws
    return len(tree.states) * (1 + sum(parts - 1 for parts in config.learner.subpaths))


def update_cost(config: Config, trees: Sequence[Tree]) -> float:
    """Cost of an iteration's update in evaluations, given the trees of its prompts in order.

    A state costs forward and backward, and 1 each for the base and an average if the loss needs them. The sampling
    policy costs 1 at each state after the first optimizer step, and with the forward process 1 per prompt, to compare
    with the rollout.
    """
    learner = config.learner
    others = (learner.kl_beta > 0) + (learner.old_kl > 0)
    states = sum(learner_states(config, tree) for tree in trees)
    probed = sum(_probe_evaluations(config, tree) for tree in trees if tree.probe)
    old = _old_states(config, trees) + len(trees) * learner.forward
    return config.velocity_cost * ((BACKWARD + learner.gradient_checkpointing + others) * states + old + probed)


def _probe_evaluations(config: Config, tree: Tree) -> int:
    """Cost of a probe's gradients: a velocity at each state, and one backward pass for each stride."""
    backward = BACKWARD - 1 + config.learner.gradient_checkpointing
    return len(np.unique(tree.source)) * (1 + backward * len(tree.strides))


def _old_states(config: Config, trees: Sequence[Tree]) -> int:
    learner = config.learner
    if not (learner.forward or learner.evaluates_old):
        return 0
    places = (state_places(tree, slot, len(trees), learner) for slot, tree in enumerate(trees))
    counts = Counter(key for of_prompt in places for key, *_ in of_prompt)
    if learner.average_samples or config.rollout.max_staleness:
        return counts.total()
    return counts.total() - counts[min(counts, key=in_order)] if counts else 0


@dataclass(frozen=True, slots=True)
class PromptCost:
    """Cost of a prompt, the mean over its possible trees."""

    evaluations: float  # of its rollout
    images: float
    states: float
    update: float  # in evaluations


def prompt_cost(config: Config, trees: Sequence[Tree]) -> PromptCost:
    """Mean cost of these trees; each tree's update is that of an iteration of equal trees, per prompt."""
    prompts = config.data.prompts_per_iteration
    rows = [
        (
            config.velocity_cost * tree.evaluations,
            len(tree.images),
            learner_states(config, tree),
            update_cost(config, [tree] * prompts) / prompts,
        )
        for tree in trees
    ]
    return PromptCost(*(sum(column) / len(trees) for column in zip(*rows, strict=True)))


def iteration_cost(config: Config, train: Sequence[str], iteration: int, choice: Choice | None = None) -> float:
    """Cost of an iteration in evaluations, rollouts and update.

    With `auto`, for this choice; None: the costliest. Exact without `auto`.
    """
    sampler, size = config.sampler, config.data.prompts_per_iteration
    drawn: Sequence[str] = [""] * size  # trees do not depend on prompts
    if sampler.is_drawn:
        drawn = iteration_prompts(train, size, config.seed, iteration)
    chosen = choice or sampler.costliest
    trees = [prompt_tree(config, iteration, slot, prompt, chosen) for slot, prompt in enumerate(drawn)]
    rollout = sum(rollout_evaluations(config, tree, iteration, slot) for slot, tree in enumerate(trees))
    return rollout + update_cost(config, trees)


def affordable(
    config: Config, train: Sequence[str], budget: float, first: int = 0, choice: Choice | None = None
) -> int:
    """Number of iterations, from `first` on, within a budget of evaluations; see `iteration_cost`."""
    for iteration in range(first, MAX_ITERATIONS):
        budget -= iteration_cost(config, train, iteration, choice)
        if budget < 0:
            return iteration - first
    return MAX_ITERATIONS - first


def object_store_bytes(config: Config) -> int:
    """Estimated maximum of bytes in the object store, the size in a private cluster.

    It has latents of the current iterations, images that wait for scores, and three versions of the LoRA.
    """
    sampler, pixels = config.sampler, config.model.pixels
    trunk, prompts = TrunkUnit(0, 0, ""), config.data.prompts_per_iteration
    latents = images = 0
    for tree in {*possible_trees(config, sampler.costliest), *possible_trees(config, sampler.costliest, probing=True)}:
        units = list(branch_units(config, tree, trunk))
        parts = [branch_part(tree, unit) for unit in units]
        latents = max(latents, 2 * len(tree.branch_points) + sum(len(part.touched) for part in parts))
        waiting = config.rollout.max_unscored_units * max(len(part.images) for part in parts)
        images = max(images, min(prompts * len(tree.images), waiting))
    under_way = (1 + config.rollout.max_staleness) * prompts * latents
    return pixels * (LATENT_BYTES * under_way + 3 * images) + 3 * RANK_BYTES * config.lora.rank + OTHER_BYTES
