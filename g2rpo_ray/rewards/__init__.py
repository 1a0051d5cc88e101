"""Reward models: pictures and prompts in, a score each out. One file a model, built by name on first use."""

from g2rpo_ray.rewards.options import check_reward, prompt_check, serving
from g2rpo_ray.rewards.registry import KINDS, PARTS, NotScores, Reward, ask, ask_parts, build_reward

__all__ = [
    "KINDS",
    "PARTS",
    "NotScores",
    "Reward",
    "ask",
    "ask_parts",
    "build_reward",
    "check_reward",
    "prompt_check",
    "serving",
]
