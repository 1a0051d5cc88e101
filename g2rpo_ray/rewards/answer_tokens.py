"""How probable a judge finds each of some answers about a picture, worst to best: a grade of any fineness (Edit-R1).

No answer is sampled: the score is the mean of the answers by the probabilities of the first token (UniWorld-V2, arXiv
2510.16888). Of a prompt with source pictures the judge sees these first, then the result. Legend: N images and prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.rewards.chat import read_first_token
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.judge import Image, Judge, Unparsed, judged, read_instruction, with_sources
from g2rpo_ray.rewards.soft_tifa import LISTED

GRADES = ("0", "1", "2", "3", "4", "5")
LEAST_SHARE = 0.5  # of the probability that the answers must have together


class AnswerTokens:
    """A question about each picture, answered in one token."""

    def __init__(self, judge: Judge, instruction: str, answers: Sequence[str]):
        self._judge, self._instruction, self.waits = judge, read_instruction(instruction), judge.waits
        self._values = {answer.lower(): at / (len(answers) - 1) for at, answer in enumerate(answers)}

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        """Scores float32 [N], 0 to 1, of images uint8 [N, H, W, 3]; NaN where the first token is no answer."""
        check_images("answer_tokens", images, prompts)
        shown = [with_sources([image], known) for image, known in zip(images, metadata, strict=True)]
        found = self._judge.each("answer_tokens", prompts, self._ask, shown)
        return np.array(found, np.float32)  # None is NaN

    def _ask(self, prompt: str, shown: Sequence[Image]) -> float:
        one_token = {"max_tokens": 1, "logprobs": True, "top_logprobs": LISTED}
        question = self._instruction.replace("{prompt}", prompt)
        return self.grade(self._judge.ask(shown, question, read_first_token, **one_token))

    def grade(self, listed: Mapping[str, float]) -> float:
        """The mean of the answers' values, 0 to 1, by what the likeliest first tokens get."""
        known = [
            (self._values[word], p) for token, p in listed.items() if (word := token.strip().lower()) in self._values
        ]
        total = sum(p for _, p in known)
        if total < LEAST_SHARE:
            raise Unparsed(f"the answers {', '.join(self._values)} have {total:.2f} of the first token's probability")
        return sum(value * p for value, p in known) / total


@judged
def build(judge: Judge, instruction: str, answers: Sequence[str] = GRADES) -> AnswerTokens:
    """`answers`: one token each, from the worst to the best; their values are evenly spaced from 0 to 1."""
    words = [answer.strip().lower() if isinstance(answer, str) else "" for answer in answers]
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ValueError(
            f"answers: {list(answers)} given; give two or more texts, no two alike, from the worst to the best"
        )
    return AnswerTokens(judge, instruction, words)
