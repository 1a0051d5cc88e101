"""UnifiedReward (arXiv 2503.05236): a vision-language model behind an OpenAI-compatible server grades each picture.

vLLM and SGLang serve it, e.g. `vllm serve CodeGoat24/UnifiedReward-7b-v1.5`. What fails is a missing score.
Legend: N images and prompts.
"""

import base64
import itertools
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.rewards.chat import ChatClient, RequestFailed, parse_url
from g2rpo_ray.rewards.images import check_images, encoded

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 1.0, 5.0
# What the model was trained with, word for word; another wording gives other scores.
INSTRUCTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the provided "
    "caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in the "
    "caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
# The label, one number, the end of the line; Markdown's stars and a full stop may stand beside them.
FINAL_SCORE = re.compile(r"Final Score:[ \t*]*\n?[ \t*]*([0-9]+(?:\.[0-9]+)?)[ \t*.]*$", re.MULTILINE)
ImageFormat = Literal["png", "jpeg"]


class UnifiedReward:
    """One question to a server for each picture, at most `concurrency` at a time."""

    def __init__(
        self, client: ChatClient, served_model: str, instruction: str, image_format: str, tokens: int, concurrency: int
    ) -> None:
        self._client, self._model, self._instruction = client, served_model, instruction
        self._format, self._max_tokens = image_format, tokens
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="unified_reward")
        self._turns = itertools.count()

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Grades float32 [N], 1 to 5, of images uint8 [N, H, W, 3] for their prompts; NaN where none was given."""
        check_images("unified_reward", images, prompts)
        turns = [next(self._turns) for _ in prompts]
        return np.array(list(self._threads.map(self._score_one, images, prompts, turns)), dtype=np.float32)

    def _score_one(self, image: NDArray[np.uint8], prompt: str, turn: int) -> float:
        data = base64.b64encode(encoded(image, self._format)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/{self._format};base64,{data}"}},
            {"type": "text", "text": self._instruction.replace("{prompt}", prompt)},
        ]
        message = {"role": "user", "content": content}
        try:
            answer = self._client.ask(
                {"model": self._model, "messages": [message], "temperature": 0, "max_tokens": self._max_tokens}, turn
            )
        except RequestFailed as failure:
            logger.warning("unified_reward: no score for %r: %s", prompt, failure)
            return float("nan")
        score = parse_score(answer)
        if np.isnan(score):
            logger.warning("unified_reward: no score for %r: no single 'Final Score: 1…5' in the answer", prompt)
        return score


def parse_score(answer: str) -> float:
    """The number after 'Final Score:'; NaN unless there is one, the same wherever it is repeated, from 1 to 5."""
    found = {float(number) for number in FINAL_SCORE.findall(answer)}
    score = found.pop() if len(found) == 1 else float("nan")
    return score if LOWEST <= score <= HIGHEST else float("nan")


def build(
    base_urls: str | Sequence[str],
    served_model: str = "",
    api_key_env: str = "",
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 1.0,
    max_tokens: int = 1024,
    image_format: ImageFormat = "png",
    instruction: str = INSTRUCTION,
) -> UnifiedReward:
    """The reward from servers that answer now: one URL, or several to be asked in turn.

    `served_model`: its name at the servers, by default the first that they list. `api_key_env`: the name of the
    environment variable that holds the key. `timeout`: seconds for an attempt; `retries` more follow, after `backoff`
    seconds, doubled each time, or what Retry-After says. ValueError in one line where any of them can't be used.
    """
    least = {"concurrency": 1, "timeout": 0.001, "retries": 0, "backoff": 0, "max_tokens": 1}
    for option, given in zip(least, (concurrency, timeout, retries, backoff, max_tokens), strict=True):
        if given < least[option]:
            raise ValueError(f"{option}: {given} given; expected {least[option]} or more")
    if image_format not in ("png", "jpeg"):
        raise ValueError(f"image_format: {image_format!r} is not one of png, jpeg")
    if "{prompt}" not in instruction:
        raise ValueError("instruction: has no {prompt}; expected a text with that where the prompt belongs")
    servers = [parse_url(url) for url in ([base_urls] if isinstance(base_urls, str) else base_urls)]
    if not servers:
        raise ValueError("base_urls: none given; expected at least one, like http://host:8000")
    client = ChatClient(servers, _key(api_key_env), timeout, retries, backoff)
    served = client.models()
    if not served or (served_model and served_model not in served):
        raise ValueError(f"served_model: {served_model!r} is not served; allowed are {', '.join(served) or 'none'}")
    return UnifiedReward(client, served_model or served[0], instruction, image_format, max_tokens, concurrency)


def _key(variable: str) -> str:
    """The key in that environment variable, "" without one; what is wrong with it is told without it."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"api_key_env: the environment variable {variable} is not set where this reward runs; set it")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"api_key_env: the key in {variable} has blanks or other characters that no HTTP header takes")
    return key
