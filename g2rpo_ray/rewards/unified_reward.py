"""UnifiedReward (arXiv 2503.05236): a vision-language model grades each image, 1 to 5.

E.g. `vllm serve CodeGoat24/UnifiedReward-7b-v1.5`.
"""

from g2rpo_ray.rewards.judge import Judge, Template, grade, judged

# The exact text of the model's training; other words give other scores.
INSTRUCTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the provided "
    "caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in the "
    "caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
read_grade = grade("Final Score")


@judged
def build(judge: Judge, instruction: str = INSTRUCTION) -> Template:
    """The reward by a judge; another `instruction` must also ask for `Final Score:`."""
    return Template("unified_reward", judge, instruction, {"": read_grade})
