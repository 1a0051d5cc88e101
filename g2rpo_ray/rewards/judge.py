"""Judges: vision-language models behind OpenAI-compatible servers (vLLM, SGLang) that grade images.

`build` makes one from the user's own template. Temperature is 0, images are PNG. A request that fails, or an answer
that does not parse, is a missing score. Legend: N images and prompts.
"""

import base64
import inspect
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.paths import resolve
from g2rpo_ray.rewards.chat import ChatClient, Read, RequestFailed, parse_url, read_text
from g2rpo_ray.rewards.images import check_images, encoded
from g2rpo_ray.types import sources_in

logger = logging.getLogger(__name__)
T = TypeVar("T")
Image = NDArray[np.uint8]
ImageFormat = Literal["png", "jpeg"]


class Unparsed(ValueError):
    """An answer of another form than expected. The text has the expected form, and nothing of the answer."""


class Judge:
    """Sends questions to one model, at most `concurrency` at a time."""

    def __init__(self, client: ChatClient, served_model: str, image_format: str, max_tokens: int, concurrency: int):
        self._client, self._model, self._format, self._max_tokens = client, served_model, image_format, max_tokens
        self.waits = client.max_ask_s, concurrency
        """See `Reward`."""
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
        self._turns = itertools.count()

    def ask(self, images: Sequence[Image], question: str, read: Read[T], **more: Any) -> T:
        """The result of `read` on the answer to a question about images uint8 [H, W, 3].

        Args:
            images: sent before the question.
            question: the text.
            read: converts the answer.
            more: further fields of the request.

        Raises:
            RequestFailed: there is no usable answer.
        """
        urls = [base64.b64encode(encoded(image, self._format)).decode() for image in images]
        pictures = [
            {"type": "image_url", "image_url": {"url": f"data:image/{self._format};base64,{url}"}} for url in urls
        ]
        message = {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}
        body = {"model": self._model, "messages": [message], "temperature": 0, "max_tokens": self._max_tokens, **more}
        return self._client.ask(body, next(self._turns), read)

    def each(self, reward: str, prompts: Sequence[str], ask: Callable[..., T], *arguments: Iterable[Any]) -> list:
        """Results of `ask(prompt, *arguments)` for each prompt; None, with a warning, without a usable answer."""

        def one(prompt: str, *given: Any) -> T | None:
            try:
                return ask(prompt, *given)
            except (RequestFailed, Unparsed) as failure:
                logger.warning("%s: no score for %r: %s", reward, prompt, failure)
                return None

        return list(self._threads.map(one, prompts, *arguments))


def with_sources(images: Sequence[Image], known: Mapping[str, Any]) -> list[Image]:
    """The images for a judge of edits: the sources in a prompt's metadata, then the results, or a result's frames."""
    return [*sources_in(known), *images]


class Template:
    """A question about each image, whose answer contains numbers, the parts. One part is the score."""

    def __init__(
        self,
        name: str,
        judge: Judge,
        instruction: str,
        read: Mapping[str, Callable[[str], float]],
        part: str = "",
        edits: bool = False,
        video: bool = False,
    ):
        """
        Args:
            name: of the reward, for messages.
            judge: answers the questions.
            instruction: see `read_instruction`.
            read: by part, a function of the answer's text; it raises Unparsed if the part is missing.
            part: the part that is the score.
            edits: also send the sources of prompts.
            video: a question is about the frames of a video, in order, not about one of them.
        """
        self._name, self._judge, self._read, self._part, self._edits = name, judge, read, part, edits
        self.scope = "video" if video else "image"
        self._instruction = read_instruction(instruction)
        self.waits = judge.waits

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> NDArray[np.float32]:
        """Scores float32 [N] of images uint8 [N, H, W, 3] or videos [N, F, H, W, 3]; NaN if missing."""
        return self.score_parts(images, prompts, metadata)[self._part]

    def score_parts(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, NDArray[np.float32]]:
        """All parts [N] of the answers, by name, from one request per image or video."""
        videos = self.scope == "video"
        check_images(self._name, images, prompts, videos)
        known = metadata if self._edits and metadata else [{}] * len(images)
        frames = images if videos else images[:, None]
        shown = [with_sources([*each], of_one) for each, of_one in zip(frames, known, strict=True)]
        found = self._judge.each(self._name, prompts, self._ask, shown)
        return {
            name: np.array([(answer or {}).get(name, np.nan) for answer in found], np.float32) for name in self._read
        }

    def _ask(self, prompt: str, shown: Sequence[Image]) -> dict[str, float]:
        answer = self._judge.ask(shown, self._instruction.replace("{prompt}", prompt), read_text)
        found: dict[str, float] = {}
        for part, read in self._read.items():
            try:
                found[part] = read(answer)
            except Unparsed as failure:
                logger.warning("%s: no score for %r: %s", self._name, prompt, failure)
        return found


def read_instruction(given: str) -> str:
    """The text of a question with {prompt} in it: `given` itself, or the content of the file of that name.

    Raises:
        ValueError: one line; there is no such file, it is not UTF-8, or its text has no {prompt}.
    """
    if "{prompt}" in given:
        return given
    expected = "expected a text with {prompt} in place of the prompt, or a file with such a text"
    if not given.strip() or "\n" in given:
        raise ValueError(f"instruction: has no {{prompt}}; {expected}")
    try:
        text = Path(resolve(given)).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        known = f"{given[:100]!r} has no {{prompt}} and is not a file ({reason})"
        raise ValueError(f"instruction: {known}; {expected}") from None
    if "{prompt}" not in text:
        raise ValueError(f"instruction: the file {given[:100]!r} has no {{prompt}}; {expected}")
    return text


def number(pattern: re.Pattern[str], lowest: float, highest: float, expected: str) -> Callable[[str], float]:
    """A function that reads the number in the pattern's group, from `lowest` to `highest`; all matches must agree."""

    def read(answer: str) -> float:
        try:
            found = {float(text) for text in pattern.findall(answer)}
        except ValueError:
            found = set()
        if len(found) != 1 or not lowest <= (score := found.pop()) <= highest:
            raise Unparsed(f"no single {expected} in the answer")
        return score

    return read


def grade(label: str) -> Callable[[str], float]:
    """A function that reads a grade from 1 to 5: the label, an optional "(1-5)", a number, an optional "/5", line end.

    Markdown, a full stop, and a line break before the number are accepted.
    """
    beside = r"[ \t*_`]*"
    found = rf"{beside}:{beside}\n?{beside}([0-9]+(?:\.[0-9]+)?){beside}(?:/ ?5)?[ \t*_`.]*$"
    pattern = rf"{label}{beside}(?:\(1[-–]5\))?{found}"
    return number(re.compile(pattern, re.MULTILINE), 1, 5, f"'{label}: 1…5'")


def open_judge(
    base_urls: str | Sequence[str],
    served_model: str = "",
    api_key_env: str = "",
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 1.0,
    max_tokens: int = 1024,
    image_format: ImageFormat = "png",
) -> Judge:
    """A judge from running servers.

    Args:
        base_urls: one URL, or several to use in turn.
        served_model: name of the model at the servers. Default: the first that they list.
        api_key_env: name of the environment variable with the key.
        concurrency: concurrent requests.
        timeout: seconds for each of: connecting, waiting for the answer, receiving it.
        retries: attempts after the first.
        backoff: seconds before the second attempt, doubled for each further one; Retry-After has precedence.
        max_tokens: length of an answer.
        image_format: "png" or "jpeg".

    Raises:
        ValueError: one line; an option or server cannot be used.
    """
    least = {"concurrency": 1, "timeout": 0.001, "retries": 0, "backoff": 0, "max_tokens": 1}
    for option, given in zip(least, (concurrency, timeout, retries, backoff, max_tokens), strict=True):
        if given < least[option]:
            raise ValueError(f"{option}: {given} given; expected {least[option]} or more")
    if image_format not in ("png", "jpeg"):
        raise ValueError(f"image_format: {image_format!r} given; allowed are png, jpeg")
    servers = [parse_url(url) for url in ([base_urls] if isinstance(base_urls, str) else base_urls)]
    if not servers:
        raise ValueError("base_urls: none given; give at least one, such as http://host:8000")
    client = ChatClient(servers, _key(api_key_env), timeout, retries, backoff)
    served = client.models()
    if not served or (served_model and served_model not in served):
        raise ValueError(f"served_model: {served_model!r} is not served; allowed are {', '.join(served) or 'none'}")
    return Judge(client, served_model or served[0], image_format, max_tokens, concurrency)


def judged(make: Callable[..., T]) -> Callable[..., T]:
    """Decorates `make(judge, …)` as a factory with the options of `open_judge` and the other options of `make`."""
    server = inspect.signature(open_judge).parameters
    own = list(inspect.signature(make).parameters.values())[1:]

    def build(**options: Any) -> T:
        judge = open_judge(**{name: given for name, given in options.items() if name in server})
        return make(judge, **{name: given for name, given in options.items() if name not in server})

    everything = sorted([*server.values(), *own], key=lambda option: option.default is not option.empty)
    build.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    return build


@judged
def build(
    judge: Judge, instruction: str, pattern: str, lowest: float = 0.0, highest: float = 1.0, video: bool = False
) -> Template:
    """A judge with the user's own template.

    Args:
        judge: answers the questions.
        instruction: see `read_instruction`.
        pattern: regular expression with one group, the number that is the score.
        lowest, highest: bounds of the score.
        video: send the frames of a video, in order, in one question.

    Raises:
        ValueError: one line; an option cannot be used.
    """
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"pattern: {pattern!r} is not a regular expression: {error}") from None
    if compiled.groups != 1:
        raise ValueError(f"pattern: {pattern!r} has {compiled.groups} groups; expected one, for the number")
    if not lowest < highest:
        raise ValueError(f"lowest: {lowest:g} given; expected less than highest={highest:g}")
    read = number(compiled, lowest, highest, f"match of {pattern!r} from {lowest:g} to {highest:g}")
    return Template("judge", judge, instruction, {"": read}, edits=True, video=video)


def _key(variable: str) -> str:
    """The key in that environment variable, "" without a variable. Error messages never contain the key."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"api_key_env: the environment variable {variable} is not set on this node; set it")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"api_key_env: the key in {variable} has characters that an HTTP header cannot contain")
    return key
