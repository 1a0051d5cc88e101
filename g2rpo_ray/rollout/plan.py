"""What the settings stand for in the algorithm's terms: a prompt's tree, its cost, the noise levels."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from g2rpo_ray.algo import Choice, Subtree, Tree, compared_leaves, plan_tree, resolution_shift, shifted_sigmas
from g2rpo_ray.config import Config, SamplerConfig
from g2rpo_ray.rewards.win_rate import win_rates
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.types import BranchUnit, FloatArray, TrunkUnit

BACKWARD = 3  # evaluations that a state of the learner counts, forward and backward


class Schedule(Protocol):
    """What of a model decides the noise levels."""

    @property
    def image_tokens(self) -> int: ...
    def sigmas(self, steps: int) -> Tensor: ...


def sigma_grid(config: SamplerConfig, model: Schedule) -> Tensor:
    """The float32 noise levels [T + 1]."""
    if config.shift == "pipeline":
        return model.sigmas(config.steps)
    shift = resolution_shift(model.image_tokens) if config.shift == "dynamic" else float(config.shift)
    return shifted_sigmas(config.steps, shift)


def prompt_tree(config: Config, iteration: int, slot: int, prompt: str, choice: Choice | None = None) -> Tree:
    """The tree of one prompt of an iteration: whoever asks gets the same. `choice`: the iteration's, of `auto`."""
    key = (config.seed, iteration, slot, prompt)
    sampler = config.sampler.decided(choice, config.sampler.probes(iteration, slot))
    tree = plan_tree(sampler.shape(_branch_steps(sampler, iteration, key), config.evaluation.anchors))
    return _with_drawn(tree, sampler.trained_share, key)


def possible_trees(config: Config, choice: Choice | None = None, probing: bool = False) -> list[Tree]:
    """The trees that a prompt of the run may have, each as likely as the others; one draw of trained steps for all.

    Of `auto`, with one choice, that of the start if none is given, and of prompts that probe or that do not.
    """
    sampler = config.sampler.decided(choice, probing)
    placements = sampler.placements()
    if sampler.branch_schedule == "slide":
        placements = [_slid(sampler, iteration) for iteration in range(config.iterations)]
    trees = [plan_tree(sampler.shape(steps, config.evaluation.anchors)) for steps in placements]
    return [_with_drawn(tree, sampler.trained_share, (config.seed,)) for tree in trees]


def _branch_steps(sampler: SamplerConfig, iteration: int, key: tuple[int | str, ...]) -> tuple[int, ...]:
    """Those of one prompt."""
    if sampler.branch_schedule == "slide":
        return _slid(sampler, iteration)
    placements = sampler.placements()
    return placements[int(torch.randint(len(placements), (), generator=generator("branch step", *key)))]


def _slid(sampler: SamplerConfig, iteration: int) -> tuple[int, ...]:
    """Moved on as far as the iteration has it; from the last place where all edges fit to the first."""
    placements = sampler.placements()
    return placements[iteration // sampler.slide_every % len(placements)]


def _with_drawn(tree: Tree, share: float, key: tuple[int | str, ...]) -> Tree:
    """The tree with a share, rounded down but at least one, of the steps of each child that may be trained."""
    if share == 1:
        return tree
    trained = tree.trained.copy()
    for subtree in tree.subtrees:
        edges = np.array(subtree.edges)
        starts = np.unique(tree.start[edges][tree.trained[edges]])
        order = torch.randperm(len(starts), generator=generator("trained", *key, *address(subtree))).numpy()
        kept = starts[order[: max(1, int(share * len(starts)))]]
        trained[edges] &= np.isin(tree.start[edges], kept)
    return replace(tree, trained=trained)


def address(subtree: Subtree) -> tuple[int, int, int]:
    """What a child is called in keys of noise: it does not depend on the size of groups or units."""
    return subtree.root, subtree.branch_step, subtree.child


class Place(Protocol):
    """Which prompt of which iteration: units and rollouts tell."""

    @property
    def iteration(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def prompt(self) -> str: ...


def edge_key(config: Config, place: Place, tree: Tree, edge: int) -> tuple[int | str, ...]:
    """The key of a stochastic edge's noise."""
    subtree = tree.subtrees[bisect_right(tree.subtrees, edge, key=lambda subtree: subtree.edges.start) - 1]
    return (
        *("edge", config.seed, place.iteration, place.slot, place.prompt),
        *(*address(subtree), edge - subtree.edges.start),
    )


def image_key(config: Config, place: Place, tree: Tree, node: int, draw: int) -> tuple[int | str, ...]:
    """The key of the noise that an image gets again for the learner."""
    subtree = tree.subtrees[bisect_right(tree.subtrees, node, key=lambda subtree: subtree.nodes.start) - 1]
    return (
        *("renoise", config.seed, place.iteration, place.slot, place.prompt),
        *(*address(subtree), int(node) - subtree.nodes.start, draw),
    )


def branch_units(config: Config, tree: Tree, trunk: TrunkUnit) -> Iterator[BranchUnit]:
    """The units that follow a prompt's trunk: a branch step and a slice of its children, of all roots."""
    of_step = config.sampler.roots * config.sampler.group_size
    size = config.rollout.members_per_unit or of_step
    for step in sorted({subtree.branch_step for subtree in tree.subtrees}):
        for first in range(0, of_step, size):
            members = min(size, of_step - first)
            yield BranchUnit(trunk.iteration, trunk.slot, trunk.prompt, step, first, members, trunk.choice)


@dataclass(frozen=True, slots=True)
class Part:
    """What of a tree a unit grows."""

    nodes: list[int]  # ascending
    edges: list[int]  # stochastic ones, ascending
    leaves: list[int]  # places in tree.leaf
    images: list[int]  # nodes, ascending: the order of the unit's images
    evaluations: int
    touched: list[int]  # ascending, what the learner needs: nodes that trained edges start or end at, or images


def trunk_part(tree: Tree) -> Part:
    nodes = list(tree.trunk)
    leaves = [place for place, node in enumerate(tree.leaf) if node in tree.trunk]
    return _part(tree, nodes, [], leaves, touched=tree.branch_points.tolist())


def branch_part(tree: Tree, unit: BranchUnit, forward: bool = False) -> Part:
    """`forward`: the learner needs the images' latents, and not those that trained edges touch."""
    subtrees = tree.members(unit.branch_step, unit.first_member, unit.members)
    nodes, edges, leaves = (
        [number for subtree in subtrees for number in getattr(subtree, kind)] for kind in ("nodes", "edges", "leaves")
    )
    trained = [edge for edge in edges if tree.trained[edge]]
    touched = set(tree.source[trained].tolist()) | set(tree.target[trained].tolist())
    touched = set(tree.trained_images.tolist()) if forward else touched
    return _part(tree, nodes, edges, leaves, touched=sorted(touched.intersection(nodes)))


def _part(tree: Tree, nodes: list[int], edges: list[int], leaves: list[int], touched: Sequence[int]) -> Part:
    images = sorted(set(tree.leaf[leaves].tolist()))
    return Part(nodes, edges, leaves, images, int(tree.inner[nodes].sum()), list(touched))


def put_scores(scores: FloatArray, tree: Tree, part: Part, found: Sequence[FloatArray]) -> None:
    """Put the scores [I] by reward of a part's images into those of the tree's leaves [R, Q]; none: nothing to put."""
    if found:
        place = {node: number for number, node in enumerate(part.images)}
        scores[:, part.leaves] = np.stack(found)[:, [place[int(node)] for node in tree.leaf[part.leaves]]]


def put_win_rates(scores: FloatArray, tree: Tree, config: Config) -> None:
    """Put win rates in place of scores [R, Q] of all of a tree's leaves, by rewards that are trained on so."""
    rows = [row for row, reward in enumerate(config.rewards.values()) if reward.win_rate]
    for leaves in compared_leaves(tree, config.credit.group) if rows else []:
        for row in rows:
            scores[row, leaves] = win_rates(scores[row, leaves])
