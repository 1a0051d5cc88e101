"""Singular stochastic sampling: an anchor by ODE, groups that branch off it, completed at every granularity."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rpo_ray.algo.kernels import ode_step
from g2rpo_ray.algo.schedule import completion_path

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [N, ...], sigma [N]) -> velocity [N, ...]; every call costs N evaluations."""

Ended = Callable[[Iterable[int], Tensor], None]
"""(rows, latents [N, ...]): these rows of the latents are at the image."""


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """What a rollout of one prompt evaluates, and what that costs."""

    steps: int
    branch_steps: tuple[int, ...]
    strides: tuple[int, ...]
    layout: str
    group_size: int

    def paths(self, branch_step: int) -> list[list[int]]:
        """The completion path of each granularity, J lists of schedule indices."""
        return [completion_path(branch_step, self.steps, stride, self.layout) for stride in self.strides]

    def branch_evaluations(self, branch_step: int) -> int:
        """Evaluations of one member at one branch step, the first one after the branch shared by all granularities."""
        lengths = [len(path) - 1 for path in self.paths(branch_step)]
        return sum(lengths) - (len(lengths) - 1) if lengths[0] else 0

    @property
    def evaluations(self) -> int:
        """Evaluations of one prompt: T + G Σ_i (Σ_j |path_ij| − 1 − (J − 1)), the fewest there can be."""
        return self.steps + self.group_size * sum(map(self.branch_evaluations, self.branch_steps))

    @property
    def naive_evaluations(self) -> int:
        """The same one branch at a time with nothing shared, not even the branch's own velocity."""
        lengths = [len(path) - 1 for step in self.branch_steps for path in self.paths(step)]
        return self.steps + self.group_size * (sum(lengths) + len(self.branch_steps))


@dataclass(frozen=True, slots=True)
class AnchorTrajectory:
    """The deterministic trajectory at the branch steps, and where it ends."""

    latents: Tensor  # [M, N, ...]
    velocities: Tensor  # [M, N, ...]
    final: Tensor  # [N, ...], the latent at sigma 0


def run_anchor(velocity: Velocity, x: Tensor, sigmas: Tensor, branch_steps: Sequence[int] = ()) -> AnchorTrajectory:
    """Integrate the ODE from x [N, ...] at σ_0 to σ_T in T evaluations a row, keeping what the branches start from."""
    latents, velocities = [], []
    for index in range(len(sigmas) - 1):
        v = velocity(x, sigmas[index].to(x).expand(len(x)))
        if index in branch_steps:
            latents.append(x)
            velocities.append(v)
        x = ode_step(x, v, sigmas[index], sigmas[index + 1])
    if not latents:
        nothing = x.new_empty(0, *x.shape)
        return AnchorTrajectory(nothing, nothing, x)
    return AnchorTrajectory(torch.stack(latents), torch.stack(velocities), x)


def complete(
    velocity: Velocity,
    x: Tensor,
    paths: Sequence[Sequence[int]],
    sigmas: Tensor,
    micro_batch: int,
    ended: Ended = lambda rows, latents: None,
) -> Tensor:
    """Complete G members [G, ...], all at the same schedule index, by ODE along each of J paths: [J, G, ...].

    Every velocity is evaluated once, the first one for all paths together. A batch takes the `micro_batch`
    trajectories with most evaluations to go, whatever their sigma, so that batches stay full until the end; which
    trajectories meet in a batch follows from the arguments alone.

    `ended` is told of rows j · G + g of latents [J · G, ...] as soon as they end, while others have steps to go.
    """
    times = (len(paths), *[1] * (x.ndim - 1))
    if len(paths[0]) == 1:  # the branch ended at the image
        state = x.repeat(times)
        ended(range(len(state)), state)
        return state.view(len(paths), *x.shape)
    grid = sigmas.to(x)
    first = torch.cat([velocity(part, grid[paths[0][0]].expand(len(part))) for part in x.split(micro_batch)])
    rows = [path for path in paths for _ in range(len(x))]  # row r is member r % G at granularity r // G
    batches = [[(r, path[0], path[1]) for r, path in enumerate(rows)], *_batches(rows, micro_batch)]
    places = torch.tensor([place for batch in batches for place in batch], device=x.device)  # in one copy, not one each
    steps = [(r, grid[now], grid[then]) for r, now, then in (b.unbind(1) for b in places.split([*map(len, batches)]))]
    (_, now, then), *others = steps
    state = ode_step(x.repeat(times), first.repeat(times), now, then)
    ended(_last_steps(batches[0], rows), state)
    for batch, (places, now, then) in zip(batches[1:], others, strict=True):
        state[places] = ode_step(state[places], velocity(state[places], now), now, then)
        ended(_last_steps(batch, rows), state)
    return state.view(len(paths), *x.shape)


def _last_steps(batch: Sequence[tuple[int, int, int]], rows: Sequence[Sequence[int]]) -> list[int]:
    """The rows of a batch whose paths end with it."""
    return [r for r, _, then in batch if then == rows[r][-1]]


def _batches(rows: Sequence[Sequence[int]], micro_batch: int) -> Iterator[list[tuple[int, int, int]]]:
    """What each batch after the first step holds: (row, schedule index now, index after) of its trajectories."""
    position = [1] * len(rows)
    while True:
        to_go = [len(row) - 1 - at for row, at in zip(rows, position, strict=True)]
        batch = sorted((r for r in range(len(rows)) if to_go[r]), key=lambda r: (-to_go[r], r))[:micro_batch]
        if not batch:
            return
        yield [(r, rows[r][position[r]], rows[r][position[r] + 1]) for r in batch]
        for r in batch:
            position[r] += 1
