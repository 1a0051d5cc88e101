"""Settings that may change when a run is resumed, and differences of settings."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from operator import getitem
from typing import Any

from g2rpo_ray.config.resources import ActorSection
from g2rpo_ray.config.schema import Config

Differences = dict[str, tuple[Any, Any]]  # by dotted key: before, now; None if it was not given

NO_EFFECT = (
    "name", "output", "iterations", "startup_timeout_s", "hung_after_s", "checkpoint.*", "tracking.*",
    "evaluation.every", "evaluation.stop_on", "*.resources*", "*.max_restarts", "rollout.min_actors",
    "rollout.runtime_env*", "learner.runtime_env*",
    "rollout.max_actors", "rollout.completions.max_actors", "rollout.completions.min_actors",
    "rollout.max_unscored_units", "rollout.memory_gib", "rewards.*.replicas",
    "eval_rewards.*.replicas", "data.embeddings", "data.encoder_resources*", "learner.velocity_tolerance",
)  # fmt: skip
"""Patterns of settings that change no bit of a result. A run resumes with any values of these only."""

TRAINING = (
    "method", "lora.*", "credit.*", "learner.*", "sampler.*", "rewards.*.weight", "data.train_prompts",
    "data.prompts_per_iteration", "rollout.max_staleness", "rollout.members_per_unit", "rollout.completions.*",
    "evaluation.anchors",
)  # fmt: skip
"""Patterns of settings that affect training but not held-out sampling: held-out scores of two runs are comparable."""
SAMPLING = ("sampler.steps", "sampler.shift")  # exceptions of TRAINING: they affect held-out sampling


def settings(
    config: Config, train: Sequence[str], heldout: Sequence[str], metadata: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings that a checkpoint records, with digests of the prompts in place of files.

    Args:
        config: all settings.
        train, heldout: the prompts.
        metadata: by prompt, for those that have any; part of the digest.
    """
    values = config.model_dump(mode="json")
    for key, value in placement(config).items():
        *parents, leaf = key.split(".")
        reduce(getitem, parents, values)[leaf] = value
    if config.learner.lr_schedule != "constant":
        values["learner"]["lr_iterations"] = config.learner.lr_iterations or config.iterations
    if config.evaluation.on_decline != "continue":
        values["evaluation"]["answered_every"] = config.evaluation.every  # else it changes no bit
    for key, prompts in (("train_prompts", train), ("heldout_prompts", heldout)):
        suffixes = (
            f"\0{json.dumps(metadata[prompt], sort_keys=True, default=str)}" if prompt in metadata else ""
            for prompt in prompts
        )
        lines = "\n".join(map("".join, zip(prompts, suffixes, strict=True)))
        digest = hashlib.sha256(lines.encode()).hexdigest()
        values["data"][key] = f"{len(prompts)} prompts, sha256 {digest[:16]}"
    return values


def placement(config: Config) -> dict[str, str | int]:
    """Device and threads of each kind of actor, by dotted key: of the resources, all that can change a bit.

    Threads are 1 on a GPU, where they change none. A pool for completions is not here: it may come, go, and move
    between unlike devices, since only scores depend on it.
    """
    sections: dict[str, ActorSection] = {"rollout": config.rollout, "learner": config.learner, **config.rewards_by_key}
    devices = {f"{key}.device": section.device for key, section in sections.items()}
    threads = {f"{key}.threads": 1 if one.device == "cuda" else one.threads for key, one in sections.items()}
    return {**devices, **threads, "data.encoder_device": config.data.encoder_device}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """The changed settings that affect the result, by dotted key."""
    return {key: (old, new) for key, old, new in _differences(before, now) if affects_result(key)}


def affects_result(key: str) -> bool:
    """True if the setting with this dotted key can change a bit of a result."""
    return not matches(key, NO_EFFECT)


def changes_in_words(changed: Differences) -> str:
    """The differences as one line: `key before -> now`, each value up to 60 characters."""
    return ", ".join(f"{key} {str(old)[:60]} -> {str(new)[:60]}" for key, (old, new) in changed.items())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in {**before, **now}:
        old, new, key = before.get(name), now.get(name), f"{above}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{key}.")
        elif old != new:
            yield key, old, new


def matches(key: str, patterns: Sequence[str]) -> bool:
    """True if a dotted key matches one of the patterns, such as TRAINING."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)
