"""From settings to the algorithm's terms: a prompt's tree, its units, the learner's states."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from g2rpo_ray.algo.completion import Choice
from g2rpo_ray.algo.tree import Subtree, Tree, compared_leaves, plan_tree
from g2rpo_ray.algo.win_rate import win_rates
from g2rpo_ray.config import Config, LearnerConfig, SamplerConfig
from g2rpo_ray.types import BranchUnit, FloatArray, Images, Ints, PromptRollout, Samples, SampleUnit, TrunkUnit

BACKWARD = 3  # cost of a learner state in evaluations, forward and backward

StepKey = tuple[int, int | None]
"""An optimizer step: part of the iteration's prompts, and schedule index at which its edges start (None: any)."""


def prompt_tree(config: Config, iteration: int, slot: int, prompt: str, choice: Choice | None = None) -> Tree:
    """The tree of one prompt of an iteration, equal on all processes. `choice` is the iteration's choice of `auto`."""
    key, probing = (config.seed, iteration, slot, prompt), config.sampler.probes(iteration, slot)
    sampler = config.sampler.decided(choice, probing)
    tree = plan_tree(sampler.shape(_branch_steps(sampler, iteration, key), config.evaluation.anchors))
    tree = _with_drawn(tree, sampler.trained_share, key)
    return replace(tree, probe=True) if probing else tree


def possible_trees(config: Config, choice: Choice | None = None, probing: bool = False) -> list[Tree]:
    """The equally likely trees of a prompt, with one draw of trained steps for all.

    With `auto`, for one choice (default: the first), and for prompts that probe or do not.
    """
    sampler = config.sampler.decided(choice, probing)
    placements = sampler.placements()
    if sampler.branch_schedule == "slide":
        placements = [_slid(sampler, iteration) for iteration in range(config.iterations)]
    trees = [plan_tree(sampler.shape(steps, config.evaluation.anchors)) for steps in placements]
    return [replace(_with_drawn(tree, sampler.trained_share, (config.seed,)), probe=probing) for tree in trees]


def _branch_steps(sampler: SamplerConfig, iteration: int, key: tuple[int | str, ...]) -> tuple[int, ...]:
    """The branch steps of one prompt."""
    if sampler.branch_schedule == "slide":
        return _slid(sampler, iteration)
    placements = sampler.placements()
    if len(placements) == 1:
        return placements[0]
    from g2rpo_ray.rollout.noise import draw_one  # imports torch

    return placements[draw_one(len(placements), "branch step", *key)]


def _slid(sampler: SamplerConfig, iteration: int) -> tuple[int, ...]:
    """The branch steps of an iteration with `slide`; after the last position the first follows."""
    placements = sampler.placements()
    return placements[iteration // sampler.slide_every % len(placements)]


def _with_drawn(tree: Tree, share: float, key: tuple[int | str, ...]) -> Tree:
    """The tree with a drawn share of each child's trainable steps as trained: rounded down, but at least one."""
    if share == 1:
        return tree
    from g2rpo_ray.rollout.noise import shuffled  # imports torch

    trained = tree.trained.copy()
    for subtree in tree.subtrees:
        edges = np.array(subtree.edges)
        starts = np.unique(tree.start[edges][tree.trained[edges]])
        order = shuffled(len(starts), "trained", *key, *address(subtree))
        kept = starts[order[: max(1, int(share * len(starts)))]]
        trained[edges] &= np.isin(tree.start[edges], kept)
    return replace(tree, trained=trained)


def address(subtree: Subtree) -> tuple[int, int, int]:
    """A child's name in keys of noise, independent of the size of groups and units."""
    return subtree.root, subtree.branch_step, subtree.child


class PromptPlace(Protocol):
    """A prompt of an iteration, as units and rollouts name it."""

    @property
    def iteration(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def prompt(self) -> str: ...


def edge_key(config: Config, place: PromptPlace, tree: Tree, edge: int) -> tuple[int | str, ...]:
    """The key of a stochastic edge's noise."""
    subtree = tree.subtrees[bisect_right(tree.subtrees, edge, key=lambda subtree: subtree.edges.start) - 1]
    return (
        *("edge", config.seed, place.iteration, place.slot, place.prompt),
        *(*address(subtree), edge - subtree.edges.start),
    )


def image_key(config: Config, place: PromptPlace, tree: Tree, node: int, draw: int) -> tuple[int | str, ...]:
    """The key of the noise that the learner adds to an image."""
    subtree = tree.subtrees[bisect_right(tree.subtrees, node, key=lambda subtree: subtree.nodes.start) - 1]
    return (
        *("renoise", config.seed, place.iteration, place.slot, place.prompt),
        *(*address(subtree), int(node) - subtree.nodes.start, draw),
    )


def branch_units(config: Config, tree: Tree, trunk: TrunkUnit) -> Iterator[BranchUnit]:
    """The branch units of a prompt: a branch step and a slice of its children, of all roots."""
    of_step = config.sampler.roots * config.sampler.group_size
    size = config.rollout.members_per_unit or of_step
    for step in sorted({subtree.branch_step for subtree in tree.subtrees}):
        for first in range(0, of_step, size):
            members = min(size, of_step - first)
            yield BranchUnit(trunk.iteration, trunk.slot, trunk.prompt, step, first, members, trunk.choice)


def exact_units(config: Config, tree: Tree, trunk: TrunkUnit) -> list[BranchUnit]:
    """The branch units with exact completions, for a prompt completed both ways. Only their scores are used."""
    if not config.rollout.completions.probes(trunk.iteration, trunk.slot):
        return []
    return [replace(unit, exact=True) for unit in branch_units(config, tree, trunk)]


def rollout_evaluations(config: Config, tree: Tree, iteration: int, slot: int) -> int:
    """Velocity evaluations of one prompt's rollout, with its exact completions."""
    twice = config.rollout.completions.probes(iteration, slot)
    return config.velocity_cost * (tree.evaluations + twice * tree.completions)


def state_places(
    tree: Tree, slot: int, prompts: int, learner: LearnerConfig
) -> Iterator[tuple[StepKey, int, Ints, int]]:
    """The learner's states of a prompt, each with its optimizer step, node, trained edges and draw.

    The forward process has `draws` states per image, for the last edge before it.
    """
    part = slot * learner.updates_per_rollout // prompts
    for node in (tree.trained_images if learner.forward else tree.states).tolist():
        served = tree.last_edge[[node]] if learner.forward else np.flatnonzero((tree.source == node) & tree.trained)
        start = int(tree.start[served[0]]) if learner.schedule == "per_step" else None
        for draw in range(learner.draws if learner.forward else 1):
            yield (part, start), node, served, draw


def in_order(key: StepKey) -> tuple[int, int]:
    """Sort key of an iteration's optimizer steps."""
    return key[0], key[1] or 0


@dataclass(frozen=True, slots=True)
class Look:
    """The samples of one held-out prompt."""

    picture: Images  # [H, W, 3], of the first seed
    scores: Mapping[str, FloatArray]  # [S] by reward
    traces: dict[str, float]  # of the images: see runs/hacking.py


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a tree that a unit grows."""

    nodes: list[int]  # ascending
    edges: list[int]  # stochastic ones, ascending
    leaves: list[int]  # indices of tree.leaf
    images: list[int]  # nodes, ascending: the order of the unit's images
    evaluations: int
    touched: list[int]  # nodes for the learner, ascending: ends of trained edges, or images


def trunk_part(tree: Tree) -> Part:
    nodes = list(tree.trunk)
    leaves = [place for place, node in enumerate(tree.leaf) if node in tree.trunk]
    return _part(tree, nodes, [], leaves, touched=tree.branch_points.tolist())


def branch_part(tree: Tree, unit: BranchUnit, forward: bool = False) -> Part:
    """The part of a branch unit; with `forward` the learner needs images' latents instead of trained edges' ends."""
    subtrees = tree.members(unit.branch_step, unit.first_member, unit.members)
    nodes, edges, leaves = (
        [number for subtree in subtrees for number in getattr(subtree, kind)] for kind in ("nodes", "edges", "leaves")
    )
    wanted = [edge for edge in edges if tree.trained[edge] or tree.probe]
    touched = set(tree.source[wanted].tolist()) | set(tree.target[wanted].tolist())
    touched = set(tree.trained_images.tolist()) if forward else touched
    return _part(tree, nodes, edges, leaves, touched=sorted(touched.intersection(nodes)))


def _part(tree: Tree, nodes: list[int], edges: list[int], leaves: list[int], touched: Sequence[int]) -> Part:
    images = sorted(set(tree.leaf[leaves].tolist()))
    return Part(nodes, edges, leaves, images, int(tree.inner[nodes].sum()), list(touched))


def leaf_scores(config: Config, tree: Tree, parts: Iterable[tuple[Part, Mapping[str, FloatArray]]]) -> FloatArray:
    """Scores [R rewards, Q leaves] of a tree from scores [I] by name of its parts' images; NaN if missing."""
    scores = np.full((len(config.rewards), len(tree.leaf)), np.nan, np.float32)
    for part, found in parts:
        if found:
            place = {node: number for number, node in enumerate(part.images)}
            images = [place[int(node)] for node in tree.leaf[part.leaves]]
            scores[:, part.leaves] = np.stack([found[name] for name in config.rewards])[:, images]
    return scores


def heldout_units(config: Config, prompts: Sequence[str]) -> list[SampleUnit]:
    """One unit per held-out prompt, with the same noise at every evaluation."""
    return [SampleUnit(prompt, tuple(range(config.evaluation.seeds))) for prompt in prompts]


def heldout_samples(config: Config, prompts: Sequence[str], looks: Sequence[Look], evaluations: int) -> Samples:
    """The samples of an evaluation, from one look per prompt."""
    scores = {name: np.stack([look.scores[name] for look in looks]) for name in config.all_rewards}
    pictures = [look.picture for look in looks[: config.evaluation.grid_prompts]]
    return Samples(list(prompts), scores, pictures, evaluations, [look.traces for look in looks])


def with_credit_scores(rollouts: Sequence[PromptRollout], config: Config) -> list[PromptRollout]:
    """The rollouts with scores for the advantage: [R, Q], or with `credit.normalise: sum` their weighted sum [1, Q].

    A leaf with a missing score has no sum.
    """
    if config.credit.normalise == "each":
        return list(rollouts)
    weights = np.array([[reward.weight] for reward in config.rewards.values()])
    sums = [(weights * rollout.scores).sum(0, keepdims=True) for rollout in rollouts]  # in float64
    return [replace(rollout, scores=total.astype(np.float32)) for rollout, total in zip(rollouts, sums, strict=True)]


def put_win_rates(scores: FloatArray, tree: Tree, config: Config) -> None:
    """Replaces scores [R, Q] of a tree's leaves by win rates, for rewards with `win_rate`."""
    rows = [row for row, reward in enumerate(config.rewards.values()) if reward.win_rate]
    for leaves in compared_leaves(tree, config.credit.group) if rows else []:
        for row in rows:
            scores[row, leaves] = win_rates(scores[row, leaves])
