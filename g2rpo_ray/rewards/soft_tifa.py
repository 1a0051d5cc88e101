"""Soft-TIFA, GenEval 2's score (arXiv 2512.16853): a judge's probabilities of the right answers about an image.

E.g. `vllm serve Qwen/Qwen3-VL-8B-Instruct`, the benchmark's judge. A prompt's metadata has `vqa_list`,
pairs of a question and the expected answer, as in `geneval2_data.jsonl`. Legend: N images and prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.rewards.chat import read_first_token
from g2rpo_ray.rewards.images import check_images
from g2rpo_ray.rewards.judge import Image, Judge, judged

Part = Literal["arithmetic", "geometric"]
TOP_LOGPROBS = 20  # requested probabilities of first tokens: vLLM's default, and OpenAI's maximum
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class SoftTIFA:
    """A question for each atom, answered in one token. The parts are the means of the right tokens' probabilities."""

    def __init__(self, judge: Judge, part: str):
        self._judge, self._part, self.waits = judge, part, judge.waits

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        """Scores float32 [N], 0 to 1, of images uint8 [N, H, W, 3]; NaN if a question has no answer."""
        return self.score_parts(images, prompts, metadata)[self._part]

    def score_parts(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, NDArray[np.float32]]:
        """Both means [N], by name, from the same answers."""
        check_images("soft_tifa", images, prompts)
        for prompt, known in zip(prompts, metadata, strict=True):
            check_prompt(prompt, known)
        asked = [(at, *pair) for at, known in enumerate(metadata) for pair in known["vqa_list"]]
        places, questions, answers = zip(*asked, strict=True)
        prompted, shown = [prompts[at] for at in places], [images[at] for at in places]
        found = iter(self._judge.each("soft_tifa", prompted, self._ask, shown, questions, answers))
        atoms = [np.array([next(found) for _ in known["vqa_list"]], np.float64) for known in metadata]  # None is NaN
        means = [(of_one.mean(), np.exp(np.log(of_one).mean())) for of_one in atoms]
        return dict(zip(get_args(Part), np.array(means, np.float32).T, strict=True))

    def _ask(self, _: str, image: Image, question: str, answer: str) -> float:
        one_token = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        listed = self._judge.ask([image], f"{question} Answer in one word.", read_first_token, **one_token)
        return probability(listed, answer)


def probability(listed: Mapping[str, float], answer: str) -> float:
    """The probability of the answer's spellings as first token: capital or not, after a blank or not, digits.

    If none is listed, it is the probability of the last listed token: an upper bound, and better than 0 in a geometric
    mean.
    """
    word = answer.lower()
    words = {word, word.capitalize(), *([str(NUMBERS.index(word) + 1)] if word in NUMBERS else [])}
    right = [listed[token] for token in listed if token.removeprefix(" ") in words]
    return min(1.0, sum(right) if right else min(listed.values()))


def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt without questions."""
    pairs = metadata.get("vqa_list")
    if not isinstance(pairs, Sequence) or not pairs or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(
            "has no vqa_list in its metadata, which soft_tifa needs; give pairs of a question and the expected answer, "
            'such as [["Are the bicycles white?", "Yes"]], in a .jsonl or .parquet file'
        )


def questions(images: int, metadata: Mapping[str, Any]) -> int:
    """Number of questions about images of one prompt."""
    return images * len(metadata["vqa_list"])


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)


@judged
def build(judge: Judge, part: Part) -> SoftTIFA:
    """The reward by a judge; `part` is the arithmetic (Soft-TIFA AM) or geometric (GM) mean over the atoms."""
    if part not in get_args(Part):
        raise ValueError(f"part: {part!r} given; allowed are {', '.join(get_args(Part))}")
    return SoftTIFA(judge, part)
