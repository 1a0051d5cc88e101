"""Reward models: scores of images for prompts. One file per model, built by name on first use."""

from g2rpo_ray.rewards.options import check_reward, max_duration_s, prompt_check, serving
from g2rpo_ray.rewards.registry import (
    KINDS,
    PARTS,
    NotScores,
    Reward,
    ask,
    ask_in_chunks,
    build_reward,
    open_reward,
    scores_of,
)

__all__ = [
    "KINDS",
    "PARTS",
    "NotScores",
    "Reward",
    "ask",
    "ask_in_chunks",
    "build_reward",
    "check_reward",
    "max_duration_s",
    "open_reward",
    "prompt_check",
    "scores_of",
    "serving",
]
