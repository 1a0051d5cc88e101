"""The figures of a report. Colours distinguish the parts of one run, or several runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.analysis.statistics import interval
from g2rpo_ray.analysis.svg import PALETTE, drawing
from g2rpo_ray.runs.reader import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("rollout", "update", "broadcast", "evaluation", "checkpoint")


def reward_curve(runs: Sequence[Run], reward: str) -> str:
    """Means by iteration: on the tree's leaves, on samples without noise, held out with 95 % intervals."""
    with drawing() as made:
        axes = made.axes
        for colour, run in zip(PALETTE, runs, strict=False):
            alone = len(runs) == 1
            leaves, samples = run.series(f"reward/{reward}/mean"), run.series(f"eval/{reward}/mean")
            if alone and len(leaves[0]):
                axes.plot(*_smoothed(*leaves), color=PALETTE[1], label="leaves of the trees")
            if len(samples[0]):
                axes.plot(*samples, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(*_smoothed(*samples), color=colour, label="without noise" if alone else None)
            elif not alone and len(leaves[0]):
                axes.plot(*_smoothed(*leaves), color=colour)
            _heldout(axes, run, reward, PALETTE[2] if alone else colour, "held out" if alone else run.name)
        axes.set(xlabel="iteration", ylabel=reward)
        _legend(axes)
    return made.svg


def _heldout(axes: "Axes", run: Run, reward: str, colour: str, label: str) -> None:
    at = [done for done, evaluation in run.evaluations.items() if reward in evaluation.scores]
    found = [interval(run.evaluations[done].scores[reward]) for done in at]
    half = [0.0 if np.isnan(one.high) else one.high - one.mean for one in found]
    axes.errorbar(
        at, [one.mean for one in found], half, color=colour, fmt="o--", markersize=4, linewidth=0.9, capsize=2,
        label=label,
    )  # fmt: skip


def curve(runs: Sequence[Run], metrics: dict[str, str], label: str, log: bool = False) -> str:
    """Metrics by iteration; `metrics` has the label of each."""
    with drawing() as made:
        axes = made.axes
        for number, (run, (metric, word)) in enumerate((run, item) for run in runs for item in metrics.items()):
            iterations, values = run.series(metric)
            name = word if len(runs) == 1 else run.name if len(metrics) == 1 else f"{run.name}: {word}"
            colour = PALETTE[number % len(PALETTE)]
            axes.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(*_smoothed(iterations, values), color=colour, label=name)
        if log:
            axes.set_yscale("log")
        axes.set(xlabel="iteration", ylabel=label)
        if len(runs) * len(metrics) > 1:
            _legend(axes)
    return made.svg


def spread_bars(runs: Sequence[Run]) -> str:
    """Spread of the first trained reward by branch step: early and late in the run, or one bar per run."""
    steps = sorted({int(name.rsplit("/", 1)[1]) for run in runs for name in run.names if "signal/spread/" in name})
    groups: list[tuple[str, list[float]]] = []
    for run in runs:
        values = [run.series(f"signal/spread/{step}")[1] for step in steps]
        quarter = max(1, max(map(len, values)) // 4)
        if len(runs) > 1:
            groups.append((run.name, [_mean(v) for v in values]))
        else:
            groups = [
                ("first quarter", [_mean(v[:quarter]) for v in values]),
                ("last quarter", [_mean(v[-quarter:]) for v in values]),
            ]
    with drawing() as made:
        width = 0.8 / len(groups)
        for number, (name, means) in enumerate(groups):
            places = np.arange(len(steps)) + (number - (len(groups) - 1) / 2) * width
            made.axes.bar(places, means, width, color=PALETTE[number % len(PALETTE)], label=name)
        made.axes.set_xticks(range(len(steps)), [str(step) for step in steps])
        made.axes.set(xlabel="branch step (0: pure noise)", ylabel="std of the reward")
        made.axes.grid(False, axis="x")
        _legend(made.axes)
    return made.svg


def time_areas(run: Run) -> str:
    """Seconds of each iteration by phase, stacked."""
    iterations = np.array([line["iteration"] for line in run.lines if line["iteration"] > 0], dtype=int)
    lines = [line for line in run.lines if line["iteration"] > 0]
    with drawing() as made:
        seconds = [[line.get(f"timing_s/{phase}") or 0.0 for line in lines] for phase in PHASES]
        made.axes.stackplot(iterations, seconds, labels=PHASES, colors=PALETTE, step="mid", linewidth=0)
        made.axes.set(xlabel="iteration", ylabel="seconds", ylim=(0, None))
        _legend(made.axes)
    return made.svg


def _smoothed(iterations: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A running mean over a twentieth of the run, with shorter windows at the ends."""
    half = len(values) // 40
    return iterations, np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _legend(axes: "Axes") -> None:
    """Puts the legend above the figure."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.4)
