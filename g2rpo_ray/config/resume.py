"""Settings that may differ when a run is resumed, and how two sets of settings differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from g2rpo_ray.config.schema import Config

Differences = dict[str, tuple[Any, Any]]  # by key: before, now; None where it was not given

FREE = (
    "name", "output", "iterations", "startup_timeout_s", "hung_after_s", "checkpoint.*", "tracking.*",
    "evaluation.every", "evaluation.stop_on", "*.resources*", "*.max_restarts", "rollout.min_actors",
    "rollout.runtime_env*", "learner.runtime_env*",
    "rollout.max_actors", "rollout.max_unscored_units", "rollout.memory_gib", "rewards.*.replicas",
    "eval_rewards.*.replicas", "data.embeddings", "data.encoder_resources*", "learner.velocity_tolerance",
)  # fmt: skip
"""Settings that change no bit of a result, `*` being any text: a run resumes with any of them. All others count."""

TRAINING = (
    "method", "lora.*", "credit.*", "learner.*", "sampler.*", "rewards.*.weight", "data.train_prompts",
    "data.prompts_per_iteration", "rollout.max_staleness", "rollout.members_per_unit", "rollout.completions.*",
    "evaluation.anchors",
)  # fmt: skip
"""Settings that count, but change only what is learned: held-out scores of two runs can be compared."""
SAMPLING = ("sampler.steps", "sampler.shift")  # change how held-out prompts are sampled


def settings(
    config: Config, train: Sequence[str], heldout: Sequence[str], metadata: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What a checkpoint says that it was made with: all settings, with the prompts themselves in place of files.

    `metadata`, by prompt, of those that have any, counts as part of the prompt.
    """
    values = config.model_dump(mode="json")
    if config.learner.lr_schedule != "constant":
        values["learner"]["lr_iterations"] = config.learner.lr_iterations or config.iterations
    for key, prompts in (("train_prompts", train), ("heldout_prompts", heldout)):
        told = (
            f"\0{json.dumps(metadata[prompt], sort_keys=True, default=str)}" if prompt in metadata else ""
            for prompt in prompts
        )
        lines = "\n".join(map("".join, zip(prompts, told, strict=True)))
        digest = hashlib.sha256(lines.encode()).hexdigest()
        values["data"][key] = f"{len(prompts)} prompts, sha256 {digest[:16]}"
    return values


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """The settings that count and are not the same, by their dotted keys."""
    return {key: (old, new) for key, old, new in _differences(before, now) if counts(key)}


def counts(key: str) -> bool:
    """Whether a setting, by its dotted key, can change a bit of a result."""
    return not matches(key, FREE)


def changes_in_words(changed: Differences) -> str:
    """The differences in words, in one line."""
    return ", ".join(f"{key} {str(old)[:60]} -> {str(new)[:60]}" for key, (old, new) in changed.items())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in {**before, **now}:
        old, new, key = before.get(name), now.get(name), f"{above}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{key}.")
        elif old != new:
            yield key, old, new


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted key is among the patterns, such as TRAINING."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)
