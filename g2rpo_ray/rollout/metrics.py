"""Metrics of an iteration's rollouts, by their names in metrics.jsonl. Means omit missing scores."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from g2rpo_ray.algo.signal import agreement, likeness, spreads
from g2rpo_ray.algo.tree import ANCHOR
from g2rpo_ray.config import Config
from g2rpo_ray.rollout.cost import learner_states, update_cost
from g2rpo_ray.rollout.plan import with_credit_scores
from g2rpo_ray.types import FloatArray, PromptRollout, Rollout, UnitReport


def rollout_metrics(rollout: Rollout, config: Config) -> dict[str, float]:
    """Counts, speeds, rewards and signals of one iteration."""
    evaluations = sum(report.evaluations for report in rollout.reports)
    images = sum(report.images for report in rollout.reports)
    metrics: dict[str, float] = {
        "rollout/evaluations": evaluations,
        "rollout/images": images,
        "rollout/weights_version": rollout.weights_version,
        "learner/states": sum(learner_states(config, prompt.tree) for prompt in rollout.prompts),
        "learner/evaluations": update_cost(config, [prompt.tree for prompt in rollout.prompts]),
        "watch/other_versions": sum(r.weights_version != rollout.weights_version for r in rollout.reports),
        "timing_s/reward": rollout.seconds - rollout.sampling_seconds,
        "perf/images_per_s": images / rollout.seconds,
        "perf/evaluations_per_s": evaluations / rollout.seconds,
    }
    own, completions = _by_pool(rollout.reports)
    metrics["perf/rollout_utilisation"] = utilisation(own, rollout.seconds)
    if completions:
        metrics["perf/completions_utilisation"] = utilisation(completions, rollout.seconds)
    if config.rollout.completions.differ:
        metrics |= _seconds_by_kind(rollout.reports)
    for name, of_anchors in rollout.anchor_scores.items():
        metrics[f"eval/{name}/mean"] = mean_of_present(of_anchors)
    return metrics | reward_metrics(rollout.prompts, config)


def reward_metrics(prompts: Sequence[PromptRollout], config: Config) -> dict[str, float]:
    """`reward/<name>/mean` and `std` of the images of branches, and the signals."""
    scores = np.concatenate([prompt.scores[:, prompt.tree.tag != ANCHOR] for prompt in prompts], axis=1)
    metrics: dict[str, float] = {}
    for place, name in enumerate(config.rewards):
        metrics[f"reward/{name}/mean"] = mean_of_present(scores[place])
        metrics[f"reward/{name}/std"] = float(np.nanstd(scores[place]))
    return metrics | signals(prompts, config)


def signals(prompts: Sequence[PromptRollout], config: Config) -> dict[str, float]:
    """`signal/agreement/<λ>`, `signal/agreement/completions` of prompts completed both ways, `signal/spread/<step>`.

    See `g2rpo_ray.algo.signal`.
    """
    group = config.credit.group
    agreements: dict[int | str, list[float]] = {}
    by_step: dict[int, list[float]] = {}
    for prompt in with_credit_scores(prompts, config):
        scores, strides = prompt.scores, prompt.tree.strides
        if len(strides) > 1:
            finest = strides.index(min(strides))
            found = agreement(prompt.tree, scores, group=group, finest=finest, reward_weights=config.credit_weights)
            for stride, row in zip(strides, found, strict=True):
                agreements.setdefault(stride, []).extend(row.tolist() if stride != min(strides) else [])
        if prompt.exact_scores is not None:
            (exact,) = with_credit_scores([replace(prompt, scores=prompt.exact_scores)], config)
            both = likeness(prompt.tree, scores, exact.scores, group=group, reward_weights=config.credit_weights)
            agreements.setdefault("completions", []).extend(both.tolist())
        for step, stds in spreads(prompt.tree, scores[0], group=group).items():
            by_step.setdefault(step, []).extend(stds)
    named = {f"signal/agreement/{stride}": mean_of_present(np.array(row)) for stride, row in agreements.items() if row}
    return named | {f"signal/spread/{step}": float(np.mean(by_step[step])) for step in sorted(by_step)}


def _seconds_by_kind(reports: Sequence[UnitReport]) -> dict[str, float]:
    """`perf/evaluation_s/*`: seconds per evaluation, with decoding: `exact` (trunks and probes) and `completions`."""
    kinds = {"completions": True, "exact": False}
    found = {kind: [r for r in reports if r.unit.startswith("branch/") == cheap] for kind, cheap in kinds.items()}
    return {
        f"perf/evaluation_s/{kind}": sum(r.seconds for r in of) / sum(r.evaluations for r in of)
        for kind, of in found.items()
    }


def _by_pool(reports: Sequence[UnitReport]) -> tuple[list[UnitReport], list[UnitReport]]:
    """The units of rollout actors, and of actors for completions alone."""
    apart = [report.actor.startswith("completions-") for report in reports]
    both = [[r for r, other in zip(reports, apart, strict=True) if other == kind] for kind in (False, True)]
    return both[0], both[1]


def utilisation(reports: Sequence[UnitReport], seconds: float) -> float:
    """Share of their time that participating actors compute, between the first unit and the last score."""
    actors = {report.actor for report in reports}
    return sum(report.seconds for report in reports) / (len(actors) * seconds)


def mean_of_present(scores: FloatArray) -> float:
    """Mean of the scores that are not missing; NaN if all are."""
    there = scores[np.isfinite(scores)]
    return float(there.mean(dtype=np.float64)) if there.size else float("nan")
