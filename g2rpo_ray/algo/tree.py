"""The sampling tree: evaluations of a method, its stochastic steps, and the images below each stochastic step.

    shape ─► nodes (latents at a schedule index), edges (stochastic steps), leaves (images), in a fixed order

A node's velocity is evaluated once, if it has children, for all of them: the evaluations of a rollout are its inner
nodes. ODE steps from one node to one index lead to one node, so granularities share the states that their paths have
in common. An image that several granularities share is one node with a leaf for each.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.algo.completion import completion_path
from g2rpo_ray.imports import named

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MAX_STATES = 200_000  # images × steps of a prompt; a larger tree would take minutes to plan

ANCHOR = -1
"""The tag of an anchor's image, which is scored but in no advantage."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The parameters of a prompt's forest. Indices are those of the schedule, 0 (noise) to `steps` (image).

    Roots are initial noises, each with a trunk of ODE steps. At each branch step, `children` leave the trunk. Each has
    `stochastic_edges` consecutive stochastic edges of `edge_length` steps, then ODE steps to the image at every
    granularity.
    """

    steps: int
    roots: int = 1
    branch_steps: tuple[int, ...] = (0,)
    children: int = 1
    stochastic_edges: int = 1
    edge_length: int = 1
    splits: tuple[int, ...] = ()  # indices at which a node among stochastic edges has `width` children instead of one
    width: int = 2
    strides: tuple[int, ...] = (1,)
    layout: str = "paper"
    untrained: tuple[int, ...] = ()  # indices at which no trained edge starts
    anchors: bool = False  # trunks continue to the image, which is scored


@dataclass(frozen=True, slots=True)
class Subtree:
    """One child of a branch point with everything below it, as ranges of nodes, edges and leaves (depth first)."""

    root: int
    branch_step: int
    child: int
    nodes: range
    edges: range
    leaves: range


@dataclass(frozen=True, eq=False)
class Tree:
    """A forest as arrays of N nodes, E stochastic edges, Q leaves (pairs of image and granularity).

    Order of nodes: roots; trunks by root; then subtrees by root, branch step and child, depth first.
    """

    index: Ints  # [N] schedule index
    parent: Ints  # [N], −1 for a root
    edge: Ints  # [N], the stochastic edge to the node, −1 for an ODE step
    source: Ints  # [E] node
    target: Ints  # [E] node
    start: Ints  # [E] schedule index of the source
    end: Ints  # [E] schedule index of the target
    trained: Bools  # [E]
    leaf: Ints  # [Q] node
    tag: Ints  # [Q] granularity: index in `strides`; ANCHOR for an anchor's image
    subtrees: tuple[Subtree, ...]  # of branch units
    strides: tuple[int, ...] = (1,)  # [J]
    probe: bool = False  # the learner gets all edges, also untrained ones, to compare their gradients

    def __getstate__(self) -> dict[str, Any]:
        """Only the fields, without cached properties, since trees are sent to every rank of the learner."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def inner(self) -> Bools:
        """Bool [N]: nodes with children, which are evaluated."""
        inner = np.zeros(len(self.index), bool)
        inner[self.parent[self.parent >= 0]] = True
        return inner

    @cached_property
    def height(self) -> Ints:
        """Evaluations [N] from a node to its furthest leaf, including its own."""
        height = np.zeros(len(self.index), np.int64)
        for node in range(len(self.index) - 1, -1, -1):  # a parent's number is below its children's
            if (parent := self.parent[node]) >= 0:
                height[parent] = max(height[parent], height[node] + 1)
        return height

    @property
    def evaluations(self) -> int:
        """Velocity evaluations of one prompt."""
        return int(self.inner.sum())

    @cached_property
    def images(self) -> Ints:
        """The image nodes, each once, ascending. They are decoded and scored."""
        return np.unique(self.leaf)

    @cached_property
    def states(self) -> Ints:
        """The parents of trained edges, each once, ascending. The learner evaluates them forward and backward."""
        return np.unique(self.source[self.trained])

    @cached_property
    def last_edge(self) -> Ints:
        """The last stochastic edge [N] between root and node; −1 if there is none."""
        last = self.edge.copy()
        for node in np.flatnonzero((last < 0) & (self.parent >= 0)):  # a parent's number is below its children's
            last[node] = last[self.parent[node]]
        return last

    @cached_property
    def trained_images(self) -> Ints:
        """The image nodes whose last edge is trained, ascending: the images of the forward process."""
        last = self.last_edge[self.images]
        return self.images[(last >= 0) & self.trained[last]]

    @property
    def trunk(self) -> range:
        """The roots and their trunks."""
        return range(self.subtrees[0].nodes.start)

    @cached_property
    def completions(self) -> int:
        """Velocity evaluations below the trunks."""
        return int(self.inner[self.trunk.stop :].sum())

    @cached_property
    def branch_points(self) -> Ints:
        """The trunk nodes with subtrees, ascending."""
        return np.unique([self.source[subtree.edges.start] for subtree in self.subtrees])

    def below(self, edge: int) -> range:
        """The indices of the leaves below an edge."""
        first, last = self._leaves_below[edge]
        return range(first, last)

    @cached_property
    def _leaves_below(self) -> list[tuple[int, int]]:
        """The range of leaves below each edge, since leaves are in depth-first order."""
        found: dict[int, tuple[int, int]] = {}
        for place, node in enumerate(self.leaf):
            at = int(node)
            while at >= 0:
                if (edge := int(self.edge[at])) >= 0:
                    found[edge] = (found.get(edge, (place, 0))[0], place + 1)
                at = int(self.parent[at])
        return [found[edge] for edge in range(len(self.source))]

    def members(self, branch_step: int, first: int, count: int) -> list[Subtree]:
        """Subtrees [first, first + count) of a branch step, ordered by root and child."""
        there = [subtree for subtree in self.subtrees if subtree.branch_step == branch_step]
        return there[first : first + count]


@lru_cache(maxsize=256)
def plan_tree(shape: Shape) -> Tree:
    """The forest of one prompt. It depends only on the shape; nothing is evaluated.

    Raises:
        ValueError: an impossible shape; the message has the parameter and the allowed values.
    """
    _check(shape)
    return _Planner(shape).tree()


def _check(shape: Shape) -> None:
    reach = shape.stochastic_edges * shape.edge_length
    last = shape.steps - reach
    if reach < 1:
        raise ValueError("stochastic_edges, edge_length: both must be at least 1")
    if not shape.branch_steps or list(shape.branch_steps) != sorted(set(shape.branch_steps)):
        raise ValueError(f"branch_steps: {list(shape.branch_steps)} given; must be ascending, each step once")
    if shape.branch_steps[0] < 0 or shape.branch_steps[-1] > last:
        raise ValueError(
            f"branch_steps: {list(shape.branch_steps)} given; allowed are 0..{last}, so that "
            f"{shape.stochastic_edges} stochastic edges of length {shape.edge_length} end within {shape.steps} steps"
        )
    if not shape.strides or min(shape.strides) < 1 or len(set(shape.strides)) != len(shape.strides):
        raise ValueError(f"strides: {list(shape.strides)} given; must be distinct whole numbers of at least 1")
    if min(shape.roots, shape.children, shape.width) < 1:
        raise ValueError("roots, children, width: each must be at least 1")
    split = sum(1 for index in shape.splits if 0 < index < shape.steps)
    images = shape.roots * len(shape.branch_steps) * shape.children * len(shape.strides) * shape.width**split
    if images * shape.steps > MAX_STATES:
        raise ValueError(
            f"roots × branch steps × children × strides × width^splits: {images} images per prompt; with steps="
            f"{shape.steps} at most {MAX_STATES // shape.steps}"
        )


class _Planner:
    """Builds the lists of a tree in the order of nodes."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._nodes: list[tuple[int, int, int]] = []  # index, parent, edge
        self._edges: list[tuple[int, int]] = []  # source, target
        self._leaves: list[tuple[int, int]] = []  # node, tag
        self._by_ode: dict[tuple[int, int], int] = {}  # (node, index) -> node after the ODE step

    def tree(self) -> Tree:
        shape = self._shape
        trunks = [[self._node(0, -1)] for _ in range(shape.roots)]
        for trunk in trunks:
            for index in range(1, (shape.steps if shape.anchors else shape.branch_steps[-1]) + 1):
                trunk.append(self._ode(trunk[-1], index))
            if shape.anchors:
                self._leaves.append((trunk[-1], ANCHOR))
        subtrees = tuple(
            self._subtree(root, step, child, trunk[step])
            for root, trunk in enumerate(trunks)
            for step in shape.branch_steps
            for child in range(shape.children)
        )
        index, parent, edge = np.array(self._nodes, np.int64).T
        source, target = np.array(self._edges, np.int64).T
        leaf, tag = np.array(self._leaves, np.int64).T
        trained = ~np.isin(index[source], shape.untrained)
        ends = index[source], index[target]
        return Tree(index, parent, edge, source, target, *ends, trained, leaf, tag, subtrees, shape.strides)

    def _subtree(self, root: int, branch_step: int, child: int, point: int) -> Subtree:
        before = len(self._nodes), len(self._edges), len(self._leaves)
        self._stochastic(point, self._shape.stochastic_edges)
        after = len(self._nodes), len(self._edges), len(self._leaves)
        return Subtree(root, branch_step, child, *(range(a, b) for a, b in zip(before, after, strict=True)))

    def _stochastic(self, source: int, to_go: int) -> None:
        """Adds a stochastic edge from a node, and everything below it; `to_go` consecutive edges with this one."""
        shape = self._shape
        end = self._nodes[source][0] + shape.edge_length
        node = self._node(end, source, edge=len(self._edges))
        self._edges.append((source, node))
        if to_go == 1:
            self._complete(node)
            return
        for _ in range(shape.width if end in shape.splits else 1):
            self._stochastic(node, to_go - 1)

    def _complete(self, node: int) -> None:
        """Adds the ODE steps from a node to the image at every granularity."""
        index = self._nodes[node][0]
        for tag, stride in enumerate(self._shape.strides):
            at = node
            for then in completion_path(index - 1, self._shape.steps, stride, self._shape.layout)[1:]:
                at = self._ode(at, then)
            self._leaves.append((at, tag))

    def _ode(self, source: int, index: int) -> int:
        if (source, index) not in self._by_ode:
            self._by_ode[source, index] = self._node(index, source)
        return self._by_ode[source, index]

    def _node(self, index: int, parent: int, edge: int = -1) -> int:
        self._nodes.append((index, parent, edge))
        return len(self._nodes) - 1


GROUPS: dict[str, Callable[[Tree], Ints]] = {"siblings": lambda tree: tree.source, "step": lambda tree: tree.start}
"""By name, a function of a tree to a number per edge, [E]; edges with equal numbers are compared."""


def groups(tree: Tree, group: str) -> Ints:
    """The number [E] of each edge's comparison group, from 0."""
    return np.unique(named("group", group, GROUPS)(tree), return_inverse=True)[1]


def compared_leaves(tree: Tree, group: str) -> list[Ints]:
    """Disjoint sets of leaves that are compared with each other, for each granularity, without anchors.

    Overlapping groups are joined: edges of a chain have the same leaves below them, and siblings' leaves are inside
    their parents'.
    """
    number, part = groups(tree, group), np.arange(len(tree.leaf))
    for of_group in range(int(number.max()) + 1):
        below = np.concatenate([tree.below(edge) for edge in np.flatnonzero(number == of_group).tolist()])
        for tag in np.unique(tree.tag[below]):
            parts = np.unique(part[below[tree.tag[below] == tag]])
            part[np.isin(part, parts)] = parts[0]
    compared = tree.tag != ANCHOR
    return [np.flatnonzero((part == one) & compared) for one in np.unique(part[compared])]
