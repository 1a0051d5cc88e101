"""Grows a tree, or a part of it, with any velocity: each node is evaluated once, in batches fixed by the plan."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from g2rpo_ray.algo.kernels import ode_step, transition
from g2rpo_ray.algo.tree import Tree

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [N, ...], sigma [N]) -> velocity [N, ...]; a call costs N evaluations."""

Noise = Callable[[Sequence[int]], Tensor]
"""(edges) -> standard normal [len(edges), ...]."""

Ended = Callable[[Iterable[int], Tensor], None]
"""(rows, latents [I, ...]): called when these rows of the latents are images, and final."""


def _no_noise(edges: Sequence[int]) -> Tensor:
    raise ValueError(f"noise: none given, but the part has {len(edges)} stochastic edges")


@dataclass(frozen=True, slots=True)
class Grown:
    """The requested results of a part."""

    latents: Tensor  # [K, ...] of the nodes in `keep`
    velocities: Tensor  # [K, ...] of the nodes in `keep`; empty if the part starts at given velocities
    log_prob: Tensor  # [E'] of the part's stochastic edges, ascending; NaN if a step has no noise
    ends: Tensor  # [I, ...] latents where the part ends, ascending by node: images, except for a trunk


def grow(
    velocity: Velocity,
    tree: Tree,
    nodes: Sequence[int],
    given: Sequence[int],
    x: Tensor,
    sigmas: Tensor,
    *,
    v: Tensor | None = None,
    kernel: str = "ode",
    eta: float = 0.0,
    noise: Noise = _no_noise,
    micro_batch: int = 1,
    keep: Sequence[int] = (),
    ended: Ended = lambda rows, latents: None,
) -> Grown:
    """Grows the nodes of a part of a tree from the latents of given nodes.

    Args:
        velocity: evaluated once for each inner node.
        tree: of one prompt.
        nodes: the part, ascending. It contains the parent of each node, except parents given with a velocity.
        given: the start: nodes of the part, or, with `v`, nodes outside whose children are in it.
        x, v: [len(given), ...] their latents, and their velocities if known.
        sigmas: the grid, [T + 1], on the CPU.
        kernel, eta, noise: of stochastic edges: see `transition`.
        micro_batch: maximum nodes per call of `velocity`, of any sigma.
        keep: nodes of the part whose latents and velocities are returned.
        ended: called when images are final, while others continue; row r is the r-th image of the part.
    """
    steps, rows = _plan(tree, nodes, given, v is not None, micro_batch, keep)
    grid = sigmas.to(x)
    state = x.new_empty(rows, *x.shape[1:])
    latents = x.new_empty(len(keep), *x.shape[1:])
    velocities = latents[:0] if v is not None else torch.empty_like(latents)
    log_prob = x.new_full((int((tree.edge[list(nodes)] >= 0).sum()),), torch.nan)
    for number, (step, at) in enumerate(zip(steps, _on_device(steps, x.device), strict=True)):
        here, speed = x, v
        if number:
            here = state[at["rows"]]
            speed = velocity(here, grid[at["index"]])
            if step.moved and v is None:
                velocities[at["moved to"]] = speed[at["moved"]]
        elif v is None:
            state[at["rows"]] = x
        if step.ode and speed is not None:
            x0, v0 = here[at["ode"]], speed[at["ode"]]
            state[at["ode row"]] = ode_step(x0, v0, grid[at["now"]], grid[at["then"]])
        for (start, end), members in step.stochastic.items():
            assert speed is not None  # given roots are evaluated first
            source, row, place = (at[f"{start} {end} {column}"] for column in range(3))
            epsilon = noise([edge for *_, edge in members])
            taken = transition(kernel, here[source], speed[source], sigmas, start, eta, next_index=end, noise=epsilon)
            state[row] = taken.next_x
            if taken.log_prob is not None:
                log_prob[place] = taken.log_prob
        if step.kept:
            latents[at["kept to"]] = state[at["kept"]]
        ended(step.images, state)
    return Grown(latents, velocities, log_prob, state)


def integrate(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """Integrates the ODE from x [N, ...] at the first sigma to the last, with N evaluations for each interval."""
    grid = sigmas.to(x)  # one copy to the device, since each would wait for earlier steps
    for place, (now, then) in enumerate(itertools.pairwise(sigmas)):
        x = ode_step(x, velocity(x, grid[place].expand(len(x))), now, then)
    return x


@dataclass(slots=True)
class _Step:
    """One batch: its evaluated nodes, and their children. Rows are those of the state, one latent each."""

    rows: list[int] = field(default_factory=list)  # rows of the batch's latents
    index: list[int] = field(default_factory=list)  # their schedule indices
    # place in the batch, child's row, schedule index, child's
    ode: list[tuple[int, int, int, int]] = field(default_factory=list)
    # by the indices of both ends: place in the batch, child's row, place among the part's edges, edge
    stochastic: dict[tuple[int, int], list[tuple[int, int, int, int]]] = field(default_factory=dict)
    kept: list[tuple[int, int]] = field(default_factory=list)  # row, place in `keep`
    moved: list[tuple[int, int]] = field(default_factory=list)  # place in the batch, place in `keep`
    images: list[int] = field(default_factory=list)  # rows of children that are images

    def columns(self) -> dict[str, list[int]]:
        """The indices that the device needs, by name."""
        named = {"rows": self.rows, "index": self.index}
        tables: list[tuple[tuple[str, ...], Sequence[tuple[int, ...]]]] = [
            (("ode", "ode row", "now", "then"), self.ode),
            (("kept", "kept to"), self.kept),
            (("moved", "moved to"), self.moved),
        ]
        for (start, end), members in self.stochastic.items():
            tables.append((tuple(f"{start} {end} {column}" for column in range(3)), members))
        for names, table in tables:
            named |= {name: [row[column] for row in table] for column, name in enumerate(names)}
        return named


def _on_device(steps: Sequence[_Step], device: torch.device) -> list[dict[str, Tensor]]:
    """The columns of all steps, copied to the device at once."""
    columns = [step.columns() for step in steps]
    flat = torch.tensor([i for named in columns for column in named.values() for i in column], device=device)
    parts = iter(flat.split([len(column) for named in columns for column in named.values()]))
    return [{name: next(parts) for name in named} for named in columns]


def _plan(
    tree: Tree, nodes: Sequence[int], given: Sequence[int], known: bool, micro_batch: int, keep: Sequence[int]
) -> tuple[list[_Step], int]:
    """The steps, beginning with the given nodes, and the number of rows.

    A node has the row of the first end of the part below it, so that its first child replaces it.
    """
    part, places = set(nodes), {node: place for place, node in enumerate(keep)}
    children = _children(tree, nodes)
    ends = [node for node in nodes if node not in children]
    row: dict[int, int] = {}
    for number, node in enumerate(ends):
        while node not in row and node in part:
            row[node] = number
            node = int(tree.parent[node])
    images = set(tree.images.tolist())
    edges = {int(edge): place for place, edge in enumerate(edge for edge in tree.edge[list(nodes)] if edge >= 0)}

    def step(batch: Sequence[int], rows: list[int], made: Iterable[int]) -> _Step:
        new = _Step(rows, tree.index[list(batch)].tolist())
        new.moved = [(place, places[node]) for place, node in enumerate(batch) if node in places]
        at = {node: place for place, node in enumerate(batch)}
        for child in made:
            source, edge = at.get(int(tree.parent[child])), int(tree.edge[child])
            if child in images:
                new.images.append(row[child])
            if child in places:
                new.kept.append((row[child], places[child]))
            if source is None:  # a given node
                continue
            start, end = int(tree.index[batch[source]]), int(tree.index[child])
            if edge < 0:
                new.ode.append((source, row[child], start, end))
            else:
                new.stochastic.setdefault((start, end), []).append((source, row[child], edges[edge], edge))
        return new

    made = [child for node in given for child in children.get(node, [])] if known else list(given)
    steps = [step(given if known else [], [] if known else [row[node] for node in given], made)]
    for batch in _batches(tree, part, children, made, micro_batch):
        made = [child for node in batch for child in children.get(node, [])]
        steps.append(step(batch, [row[node] for node in batch], made))
    return steps, len(ends)


def batch_sizes(tree: Tree, nodes: Sequence[int], micro_batch: int) -> list[int]:
    """Sizes of the calls of `velocity` by `grow` for a part that starts at roots or at known velocities."""
    part = set(nodes)
    ready = [node for node in nodes if int(tree.parent[node]) not in part]
    return [len(batch) for batch in _batches(tree, part, _children(tree, nodes), ready, micro_batch)]


def _children(tree: Tree, nodes: Sequence[int]) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for node in nodes:
        children.setdefault(int(tree.parent[node]), []).append(node)
    return children


def _batches(
    tree: Tree, part: set[int], children: dict[int, list[int]], ready: Iterable[int], micro_batch: int
) -> Iterator[list[int]]:
    """The batches of a part's inner nodes: of the ready nodes, those with the most remaining steps.

    They depend only on the tree, the part and the size, and are full until the last paths end.
    """
    heap = [(-int(tree.height[node]), node) for node in ready if tree.inner[node]]
    heapq.heapify(heap)
    while heap:
        batch = [heapq.heappop(heap)[1] for _ in range(min(micro_batch, len(heap)))]
        yield batch
        for node in batch:
            for child in children.get(node, []):
                if tree.inner[child]:
                    heapq.heappush(heap, (-int(tree.height[child]), child))
