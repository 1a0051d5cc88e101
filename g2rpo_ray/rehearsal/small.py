"""Reduces the user's configuration to the size of a rehearsal, with the twin of its model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from g2rpo_ray.config import Config, RewardConfig, with_settings
from g2rpo_ray.data import Prompts
from g2rpo_ray.rehearsal.published import with_shapes

ITERATIONS = 2
PATCHES, TOKENS = 2, 32  # of a picture, along an edge; of a prompt
SMALL = 64  # pixels along an edge that stay as they are: rewards of small worlds know their size
PROMPTS, HELDOUT, SEEDS = 2, 2, 2
FRAMES = 5  # two latents of Wan's
STAND_IN = "jpeg_compressibility"  # loads nothing, and scores pictures of any prompt
HERE: Mapping[str, Any] = {"resources": {"CPU": 0}, "runtime_env": {}}
"""Settings of a section with actors, for a machine with a few cores and no GPU."""


def small(config: Config, untried: Mapping[str, str], prompts: Prompts, folder: Path, alone: bool = False) -> Config:
    """The configuration of the rehearsal in `folder`, whose twin is in `folder`/twin.

    Method, tree, objective, batches, dtype, ZeRO stage and checkpointing stay as they are.

    Args:
        untried: rewards, by key, for which STAND_IN scores.
        alone: for a run in one process, with 1 rank and no staleness.
    """
    learner, rollout, cores = config.learner, config.rollout, len(os.sched_getaffinity(0))
    ranks, actors = (1, 1) if alone else (min(learner.ranks, cores), min(rollout.max_actors, max(1, cores // 2)))
    tokens, patch = min(config.model.max_sequence_length or TOKENS, TOKENS), _patch(config)
    fewest = max(PROMPTS, learner.updates_per_rollout)
    heldout: Any = [{"prompt": one, "metadata": prompts.records[one]} for one in prompts.heldout[:HELDOUT]]
    heldout = config.data.heldout_prompts if config.model.sources else heldout  # a record has no pictures
    sections = {"rollout": rollout, "learner": learner}
    changed = {
        "output": str(folder), "iterations": ITERATIONS,
        "model.path": str(folder / "twin"), "model.height": _size(config.model.height, patch),
        "model.width": _size(config.model.width, patch),
        "model.frames": min(config.model.frames, FRAMES),
        "model.source_area": SMALL * SMALL if config.model.sources else None, "model.max_sequence_length": tokens,
        "data.prompts_per_iteration": min(config.data.prompts_per_iteration, fewest),
        "data.heldout_prompts": heldout, "data.embeddings": str(folder / "embeddings"),
        "data.encoder_resources": {"CPU": 0},
        "evaluation.seeds": min(config.evaluation.seeds, SEEDS), "evaluation.stop_on": (),
        "checkpoint.every": 1, "tracking.wandb_project": "",
        "learner.ranks": ranks, "learner.compile": False, "learner.warmup": min(learner.warmup, ITERATIONS - 1),
        "rollout.max_actors": actors, "rollout.min_actors": min(rollout.min_actors, actors), "rollout.compile": False,
        "rollout.completions.compile": False, "rollout.completions.resources": {"CPU": 0},
        "rollout.completions.max_actors": min(1, rollout.completions.max_actors), "rollout.completions.min_actors": 1,
        **{f"{name}.{key}": value for name in sections for key, value in HERE.items()},
        "rewards": _at_hand("rewards", config.rewards, untried),
        "eval_rewards": _at_hand("eval_rewards", config.eval_rewards, untried),
    }  # fmt: skip
    if learner.lr_schedule != "constant":  # the rate falls as in the run itself
        changed["learner.lr_iterations"] = learner.lr_iterations or config.iterations
    if alone:
        changed["rollout.max_staleness"] = 0
    backends: dict[str, Any] = {"model": config.model, "rollout": rollout, "rollout.completions": rollout.completions}
    changed |= {f"{name}.attention_backend": "native" for name, has in backends.items() if has.attention_backend}
    fresh = config.model_copy(update={"lora": config.lora.model_copy(update={"initial": None})})  # it fits the model
    return with_settings(fresh, changed)


def differences(config: Config, rehearsed: Config) -> list[str]:
    """The settings that differ, as `key now (before)`, without paths, devices and rewards."""
    keys = (
        "iterations", "model.height", "model.width", "model.frames", "model.source_area", "model.max_sequence_length",
        "data.prompts_per_iteration",
        "evaluation.seeds", "rollout.max_actors", "rollout.completions.max_actors",
        "rollout.max_staleness", "learner.ranks", "learner.warmup",
        "model.attention_backend", "rollout.attention_backend", "rollout.compile", "learner.compile",
        "rollout.completions.attention_backend", "rollout.completions.compile", "tracking.wandb_project",
        "rollout.runtime_env", "learner.runtime_env", "lora.initial",
    )  # fmt: skip
    pairs = [(key, _of(config, key), _of(rehearsed, key)) for key in keys]
    return [f"{key} {now} ({before})" for key, before, now in pairs if before != now and (before or now)]


def _of(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _size(given: int, patch: int) -> int:
    return given if given <= SMALL and given % patch == 0 else PATCHES * patch


def _patch(config: Config) -> int:
    """Edge of a latent patch, in pixels."""
    from g2rpo_ray.models import describe_model

    shaped = with_shapes(config)
    assert shaped is not None, "a twin was made of it"
    family, description = describe_model(shaped.model)
    return 2 * family.vae_scale(description.autoencoder)


def _at_hand(section: str, rewards: Mapping[str, RewardConfig], untried: Mapping[str, str]) -> dict[str, Any]:
    """A section of rewards on this machine, with the stand-ins."""
    stand_in = {"kind": STAND_IN, "options": {}}
    return {
        name: {**reward.model_dump(), **HERE, "replicas": 1, **(stand_in if f"{section}.{name}" in untried else {})}
        for name, reward in rewards.items()
    }
