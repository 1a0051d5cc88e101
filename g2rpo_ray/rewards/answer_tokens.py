"""A continuous grade from a judge's probabilities of several answers about an image, worst to best (Edit-R1).

No answer is sampled. The score is the mean of the answers, weighted by the probabilities of the first token
(UniWorld-V2, arXiv 2510.16888). The judge receives the sources of a prompt, then the result. Legend: N images and
prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.rewards.chat import read_first_token
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.judge import Image, Judge, Unparsed, judged, read_instruction, with_sources
from g2rpo_ray.rewards.soft_tifa import TOP_LOGPROBS

GRADES = ("0", "1", "2", "3", "4", "5")
MIN_SHARE = 0.5  # of the first token's probability, for all answers together


class AnswerTokens:
    """A question about each image, answered in one token."""

    def __init__(self, judge: Judge, instruction: str, answers: Sequence[str], video: bool):
        self.scope = "video" if video else "image"
        self._judge, self._instruction, self.waits = judge, read_instruction(instruction), judge.waits
        self._values = {answer.lower(): at / (len(answers) - 1) for at, answer in enumerate(answers)}

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        """Scores float32 [N], 0 to 1, of images uint8 [N, H, W, 3] or videos [N, F, H, W, 3].

        NaN if the first token is not an answer.
        """
        videos = self.scope == "video"
        check_images("answer_tokens", images, prompts, videos)
        frames = images if videos else images[:, None]
        shown = [with_sources([*each], known) for each, known in zip(frames, metadata, strict=True)]
        found = self._judge.each("answer_tokens", prompts, self._ask, shown)
        return np.array(found, np.float32)  # None is NaN

    def _ask(self, prompt: str, shown: Sequence[Image]) -> float:
        one_token = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        question = self._instruction.replace("{prompt}", prompt)
        return self.grade(self._judge.ask(shown, question, read_first_token, **one_token))

    def grade(self, listed: Mapping[str, float]) -> float:
        """The mean of the answers' values, 0 to 1, weighted by the probabilities `listed` of first tokens."""
        known = [
            (self._values[word], p) for token, p in listed.items() if (word := token.strip().lower()) in self._values
        ]
        total = sum(p for _, p in known)
        if total < MIN_SHARE:
            raise Unparsed(f"the answers {', '.join(self._values)} have {total:.2f} of the first token's probability")
        return sum(value * p for value, p in known) / total


@judged
def build(judge: Judge, instruction: str, answers: Sequence[str] = GRADES, video: bool = False) -> AnswerTokens:
    """The reward by a judge.

    Args:
        judge: answers the questions.
        instruction: see `judge.read_instruction`.
        answers: one token each, from the worst to the best. Their values are evenly spaced from 0 to 1.
        video: send the frames of a video, in order, in one question.

    Raises:
        ValueError: one line; an option cannot be used.
    """
    words = [answer.strip().lower() if isinstance(answer, str) else "" for answer in answers]
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ValueError(
            f"answers: {list(answers)} given; give two or more different texts, from the worst to the best"
        )
    return AnswerTokens(judge, instruction, words, video)
