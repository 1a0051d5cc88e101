"""UnifiedReward 2.0: a vision-language model grades alignment, coherence and style of each image, 1 to 5 each.

E.g. `vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b`. Three rewards, one `part` each, share one request per image.
Question and answer are those of its repository (point_score_ACS_image_generation.py).
"""

from typing import Literal, get_args

from g2rpo_ray.rewards.judge import Judge, Template, grade, judged

Part = Literal["alignment", "coherence", "style"]
# The exact text of the model's training; other words give other scores.
INSTRUCTION = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\nProvide overall assessments for the image "
    "along the following axes (each rated from 1 to 5):\n- Alignment Score: How well the image matches the caption in "
    "terms of content.\n- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy."
    "\n\nOutput your evaluation using the format below:\n\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
GRADES = {part: grade(f"{part.title()} Score") for part in get_args(Part)}


@judged
def build(judge: Judge, part: Part) -> Template:
    """The reward by a judge; `part` is "alignment", "coherence" or "style"."""
    if part not in GRADES:
        raise ValueError(f"part: {part!r} given; allowed are {', '.join(GRADES)}")
    return Template("unified_reward_2", judge, INSTRUCTION, GRADES, part)
