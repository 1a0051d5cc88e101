"""Pairwise preference (Pref-GRPO, arXiv 2508.20751): an image's win rate within its group, by a judge.

E.g. `vllm serve CodeGoat24/UnifiedReward-Think-qwen-7b`. Legend: N images of one prompt, the group.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.algo.win_rate import shares
from g2rpo_ray.rewards.chat import read_text
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.judge import Image, Judge, Unparsed, judged, read_instruction, with_sources

# The exact text of UnifiedReward-Think-qwen-7b's training; other words give other answers.
INSTRUCTION = (
    "Given a caption and two images generated based on this caption, please analyze in detail the two provided images. "
    "Evaluate them on various dimensions such as semantic consistency (how closely the image content aligns with the "
    "caption), aesthetics (composition, color usage, artistic expression), authenticity (realism and attention to "
    "detail), and any other factors you deem relevant. For each evaluation dimension, provide a score between 1-10 for "
    "both images (e.g., Image 1: 8/10, Image 2: 6/10) and provide a concise rationale for the score. Calculate the "
    "total score for each image by summing all dimension scores. Use a chain-of-thought process to detail your "
    "reasoning steps, and enclose all your detailed reasoning within <think> and </think> tags. Then, in the <answer> "
    "tag, output exactly one of the following strings: 'Image 1 is better' or 'Image 2 is better' based on the total "
    "scores. No additional text is allowed in the <answer> section.\n\nExample output format:\n<think>\n1. Semantic "
    "consistency: Image 1 (9/10) - ...; Image 2 (7/10) - ...\n2. Aesthetics: Image 2 (8/10) - ...; Image 1 (8/10) - "
    "...\n3. Authenticity: Image 1 (8/10) - ...; Image 2 (5/10) - ...\n[Additional dimensions if any]: Image 2 (8/10) "
    "- ...; Image 1 (6/10) - ...\nTotal score:\nImage 1: 9+8+8+6=31\nImage 2: 7+8+5+8=28\n</think>\n<answer>Image 1 is "
    "better</answer>\n**Note: In the example above, scores and the final answer are placeholders meant only to "
    "demonstrate the format. Your actual evaluation should be based on the quality of two given images.**\n\nYour task "
    "is provided as follows:\nText Caption: [{prompt}]"
)
PATTERN = (
    r"<answer>\s*(?:(?P<first>Image 1 is better)|(?P<second>Image 2 is better)|(?P<tie>Both images are equally good))"
    r"\.?\s*</answer>"
)
POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5}  # of the first image, by verdict


class Pairwise:
    """Compares all pairs of images of a group. A pair without an answer does not count."""

    scope = "group"

    def __init__(self, judge: Judge, instruction: str, pattern: re.Pattern[str], both_orders: bool):
        self._judge, self._instruction, self._pattern = judge, instruction, pattern
        self._pairs = permutations if both_orders else combinations
        self.waits = judge.waits

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> NDArray[np.float32]:
        """Win rates float32 [N], 0 to 1, of images uint8 [N, H, W, 3] of one prompt; NaN without a comparison."""
        check_images("pairwise", images, prompts)
        if len(set(prompts)) != 1:
            raise ValueError("reward pairwise: images of several prompts given; expected those of one group")
        pairs = list(self._pairs(range(len(images)), 2))
        known = metadata[0] if metadata else {}
        shown = [with_sources((images[first], images[second]), known) for first, second in pairs]
        verdicts = self._judge.each("pairwise", [prompts[0]] * len(pairs), self._ask, shown)
        won = np.full((len(images), len(images)), np.nan)
        for (first, second), worth in zip(pairs, verdicts, strict=True):
            won[first, second] = np.nan if worth is None else worth
        return shares(np.stack([won, 1 - won.T]))  # once as the first image, once as the second

    def _ask(self, prompt: str, shown: Sequence[Image]) -> float:
        answer = self._judge.ask(shown, self._instruction.replace("{prompt}", prompt), read_text)
        verdicts = {found.lastgroup for found in self._pattern.finditer(answer)}
        if len(verdicts) != 1:
            raise Unparsed("no single verdict in the answer")
        return POINTS[str(verdicts.pop())]


def questions(images: int, metadata: Mapping[str, Any]) -> int:
    """Maximum number of questions about a group: each pair of images in both orders."""
    return images * (images - 1)


@judged
def build(judge: Judge, instruction: str = INSTRUCTION, pattern: str = PATTERN, both_orders: bool = False) -> Pairwise:
    """The reward by a judge.

    Args:
        judge: compares the images.
        instruction: see `judge.read_instruction`.
        pattern: regular expression with the named groups `first`, `second` and optionally `tie`, one of which matches.
        both_orders: compare every pair in both orders, for a judge that prefers a position.

    Raises:
        ValueError: one line; an option cannot be used.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern: {pattern!r} is not a regular expression: {error}") from None
    if not {"first", "second"} <= compiled.groupindex.keys() <= POINTS.keys() or compiled.groups != len(
        compiled.groupindex
    ):
        raise ValueError(
            f"pattern: {pattern!r}; expected the named groups first, second, optionally tie, and no others"
        )
    return Pairwise(judge, read_instruction(instruction), compiled, both_orders)
