"""What an iteration's rollouts tell, by the names of the run directory. A missing score is in none of the means."""

from collections.abc import Sequence

import numpy as np
import torch

from g2rpo_ray.algo import ANCHOR, agreement, spreads
from g2rpo_ray.config import Config
from g2rpo_ray.launch.plan import learner_states
from g2rpo_ray.record.tracking import Metrics
from g2rpo_ray.types import FloatArray, PromptRollout, Rollout, UnitReport


def rollout_metrics(rollout: Rollout, config: Config) -> dict[str, float]:
    """Counts, speeds, rewards and signals of one iteration."""
    scores = np.concatenate([prompt.scores[:, prompt.tree.tag != ANCHOR] for prompt in rollout.prompts], axis=1)
    evaluations = sum(report.evaluations for report in rollout.reports)
    images = sum(report.images for report in rollout.reports)
    metrics: dict[str, float] = {
        "rollout/evaluations": evaluations,
        "rollout/images": images,
        "rollout/weights_version": rollout.weights_version,
        "learner/states": sum(learner_states(config, prompt.tree) for prompt in rollout.prompts),
        "perf/rollout_utilisation": utilisation(rollout.reports, rollout.seconds),
        "perf/images_per_s": images / rollout.seconds,
        "perf/evaluations_per_s": evaluations / rollout.seconds,
    }
    for place, name in enumerate(config.rewards):
        metrics[f"reward/{name}/mean"] = mean_of_present(scores[place])
        metrics[f"reward/{name}/std"] = float(np.nanstd(scores[place]))
    for name, of_anchors in rollout.anchor_scores.items():
        metrics[f"eval/{name}/mean"] = mean_of_present(of_anchors)
    return metrics | signals(rollout.prompts, config)


def signals(prompts: Sequence[PromptRollout], config: Config) -> dict[str, float]:
    """`signal/agreement/<λ>` and `signal/spread/<step>`: see `g2rpo_ray.algo.signal`."""
    group = config.credit.group
    weights = [reward.weight for reward in config.rewards.values()]
    agreements: dict[int, list[float]] = {}
    by_step: dict[int, list[float]] = {}
    for prompt in prompts:
        scores, strides = torch.tensor(prompt.scores), prompt.tree.strides
        if len(strides) > 1:
            finest = strides.index(min(strides))
            found = agreement(prompt.tree, scores, group=group, finest=finest, reward_weights=weights)
            for stride, row in zip(strides, found, strict=True):
                agreements.setdefault(stride, []).extend(row.tolist() if stride != min(strides) else [])
        for step, stds in spreads(prompt.tree, scores[0], group=group).items():
            by_step.setdefault(step, []).extend(stds)
    named = {f"signal/agreement/{stride}": mean_of_present(np.array(row)) for stride, row in agreements.items() if row}
    return named | {f"signal/spread/{step}": float(np.mean(by_step[step])) for step in sorted(by_step)}


def hacked(window: Sequence[Metrics], trained: Sequence[str], judges: Sequence[str]) -> bool:
    """Whether every trained reward rose and every judge fell, from the first half of the window to the second.

    Both are means over the anchors: on-policy samples without noise. Where these are not scored, nothing is known.
    """
    if any(f"eval/{name}/mean" not in line for line in window for name in (*trained, *judges)):
        return False

    def rise(name: str) -> float:
        scores = np.array([line[f"eval/{name}/mean"] for line in window])
        return float(scores[len(scores) // 2 :].mean() - scores[: len(scores) // 2].mean())

    return bool(judges) and all(rise(name) > 0 for name in trained) and all(rise(name) < 0 for name in judges)


def utilisation(reports: Sequence[UnitReport], seconds: float) -> float:
    """Share of the time of the actors that took part which they spent computing, between first unit and last score."""
    actors = {report.actor for report in reports}
    return sum(report.seconds for report in reports) / (len(actors) * seconds)


def mean_of_present(scores: FloatArray) -> float:
    """Mean of the scores that are there, NaN where none is."""
    there = scores[np.isfinite(scores)]
    return float(there.mean(dtype=np.float64)) if there.size else float("nan")
