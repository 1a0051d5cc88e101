"""The batch of an iteration over the ranks: distribution of prompts, optimizer steps, reduction of metrics.

Numpy only, because the driver imports it without torch, DeepSpeed or a model. Shapes as in `g2rpo_ray.types`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.algo.alignment import Alignment
from g2rpo_ray.algo.credit import batch_std, scored_edges
from g2rpo_ray.config import LearnerConfig
from g2rpo_ray.rollout.plan import StepKey, in_order, state_places
from g2rpo_ray.types import PromptRollout, source_sizes

if TYPE_CHECKING:
    from torch import Tensor

Part = tuple["Tensor", dict[str, "Tensor"]]
"""A state's part of the loss and the metrics of an optimizer step."""
T = TypeVar("T")
Sizes = tuple[str, ...]
"""Sizes of the sources of a prompt: see `types.source_sizes`."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """One optimizer step, over all ranks."""

    key: StepKey
    edges: int  # the denominator: trained edges with all scores, counted once per state
    kinds: tuple[tuple[Sizes, int], ...]
    """By sizes of sources, the maximum number of states of a rank. All ranks evaluate this number, since a pass may be
    a collective. A pass has sources of equal sizes."""
    fresh: bool = False  # True if the policy is still the sampling policy

    @property
    def states(self) -> int:
        """States that each rank evaluates."""
        return sum(count for _, count in self.kinds)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Numbers of the whole batch for each rank, so that the loss does not depend on the distribution of prompts."""

    prompts: int
    steps: tuple[StepShape, ...]  # in order, without steps that have no scored edge
    batch_std: tuple[float, ...]  # [R]
    on_policy: bool = True  # True if the sampling weights are the updated ones
    iteration: int = 0  # from 0

    @classmethod
    def of(
        cls, shards: Sequence[Sequence[PromptRollout]], learner: LearnerConfig, on_policy: bool = True
    ) -> "BatchShape":
        """The shape of a batch; `shards` are those of all ranks, from `spread`."""
        real = {rollout.slot: rollout for shard in shards for rollout in shard if np.isfinite(rollout.scores).any()}
        prompts = max((rollout.slot for shard in shards for rollout in shard), default=0) + 1
        edges: dict[StepKey, int] = {}
        for rollout in real.values():
            scored = scored_edges(rollout.tree, rollout.scores) & rollout.tree.trained
            for key, _, served, _ in state_places(rollout.tree, rollout.slot, prompts, learner):
                edges[key] = edges.get(key, 0) + int(scored[served].sum())
        counts: list[dict[tuple[StepKey, Sizes], int]] = []
        for shard in shards:
            counts.append({})
            for rollout in shard:
                sizes = source_sizes(rollout.prompt)
                for key, *_ in state_places(rollout.tree, rollout.slot, prompts, learner):
                    counts[-1][key, sizes] = counts[-1].get((key, sizes), 0) + 1
        keys = sorted((key for key, number in edges.items() if number), key=in_order)
        kinds = sorted({source_sizes(rollout.prompt) for shard in shards for rollout in shard})
        most = {key: [(sizes, max(count.get((key, sizes), 0) for count in counts)) for sizes in kinds] for key in keys}
        steps = tuple(
            StepShape(key, edges[key], tuple(kind for kind in most[key] if kind[1]), on_policy and not place)
            for place, key in enumerate(keys)
        )
        ordered = [real[slot] for slot in sorted(real)]
        trees, scores = [rollout.tree for rollout in ordered], [rollout.scores for rollout in ordered]
        std = batch_std(trees, scores).tolist() if ordered else []
        return cls(prompts, steps, tuple(std), on_policy, shards[0][0].iteration)


def spread(rollouts: Sequence[PromptRollout], ranks: int) -> list[list[PromptRollout]]:
    """The prompts of each rank. A rank without prompts gets a copy without scores, which counts in no loss."""
    mute = replace(rollouts[0], scores=np.full_like(rollouts[0].scores, np.nan))
    return [list(rollouts[rank::ranks]) or [mute] for rank in range(ranks)]


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """One rank's part of an update's metrics: sums and maxima, to be reduced over the ranks."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    mismatch: dict[str, list[float]] = field(default_factory=dict)
    """Differences between rollout and learner: `velocity`, relative errors at states; `log_prob`, absolute differences
    at edges; `lost_edges`, 1 for an edge that would have no gradient from the start."""

    alignment: Alignment | None = None
    """Measurements of an iteration's probes, equal on every rank."""

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def largest(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def observe(self, mismatch: Mapping[str, "Tensor"]) -> None:
        for name, values in mismatch.items():
            self.mismatch.setdefault(name, []).extend(values.double().flatten().tolist())

    @property
    def velocity_error(self) -> float:
        """The largest observed error, infinite for NaN; 0 without observations."""
        return max(
            (math.inf if math.isnan(error) else error for error in self.mismatch.get("velocity", ())), default=0.0
        )

    def add_advantages(self, values: NDArray[Any], flat_groups: int, groups: int) -> None:
        """Adds the advantages of scored edges, and the numbers of groups and of groups without spread."""
        values = values.astype(np.float64)
        self.add("advantage/zero_std_groups", flat_groups)
        self.add("groups", groups)
        self.add("edges", len(values))
        self.add("advantage", float(values.sum()))
        self.add("advantage_squared", float((values**2).sum()))
        self.largest("advantage/abs_max", float(np.abs(values).max(initial=0.0)))


@dataclass(frozen=True, slots=True)
class Update:
    """The result of an iteration's update."""

    metrics: dict[str, float]
    alignment: Alignment | None = None


def reduce_metrics(ranks: Sequence[RankMetrics]) -> dict[str, float]:
    """The update's metrics, by their names in metrics.jsonl, from all ranks' parts."""
    sums, maxima = RankMetrics(), RankMetrics()
    for rank in ranks:
        for name, value in rank.sums.items():
            sums.add(name, value)
        for name, value in rank.maxima.items():
            maxima.largest(name, value)
        for name, values in rank.mismatch.items():
            sums.mismatch.setdefault(name, []).extend(values)
    edges = sums.sums.pop("edges")
    flat = sums.sums["advantage/zero_std_groups"] / max(sums.sums.pop("groups"), 1)
    eps_share = sums.sums.pop("eps_below") / max(sums.sums.pop("eps_of"), 1)
    mean = sums.sums.pop("advantage") / edges
    variance = sums.sums.pop("advantage_squared") / edges - mean**2
    return {
        **sums.sums,
        **maxima.maxima,
        **_mismatch(sums),
        "watch/flat_groups": flat,
        "learner/eps_share": eps_share,
        "advantage/mean": mean,
        "advantage/std": math.sqrt(max(variance, 0.0)),
    }


def _mismatch(all_ranks: RankMetrics) -> dict[str, float]:
    found, metrics = all_ranks.mismatch, {}
    if found.get("velocity"):
        metrics["mismatch/velocity"] = all_ranks.velocity_error
    if log_probs := found.get("log_prob"):
        metrics["mismatch/log_prob_mean"] = float(np.mean(log_probs))
        metrics["mismatch/log_prob_p99"] = float(np.quantile(log_probs, 0.99))
        metrics["mismatch/lost_edges"] = float(np.mean(found["lost_edges"]))
    return metrics


def padded(states: Sequence[T], spare: Sequence[T], step: StepShape, prompt: Callable[[T], str]) -> list[T]:
    """The states of a step, grouped by sizes of sources, padded to the step's number by `spare`.

    Spare states count in no loss.
    """
    found: list[T] = []
    for sizes, count in step.kinds:
        own = [state for state in states if source_sizes(prompt(state)) == sizes]
        filling = next((state for state in spare if source_sizes(prompt(state)) == sizes), spare[0])
        found += own + [filling] * (count - len(own))
    return found


def micro_batches(states: Sequence[T], size: int, step: StepShape | None = None) -> Iterator[Sequence[T]]:
    """The states of each forward and backward pass; with a step, a pass has sources of equal sizes."""
    first = 0
    for count in [len(states)] if step is None else [count for _, count in step.kinds]:
        for start in range(first, first + count, size):
            yield states[start : min(start + size, first + count)]
        first += count


def relative_error(found: "Tensor", expected: "Tensor") -> "Tensor":
    """Relative error |found − expected| / |expected| of each row, [N]."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
