"""Reward models: pictures and prompts in, a score each out. One file a model, built by name on first use."""

from g2rpo_ray.rewards.options import check_reward, longest_s, prompt_check, serving
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
    "longest_s",
    "open_reward",
    "prompt_check",
    "scores_of",
    "serving",
]
