"""OCR, Flow-GRPO's second task (arXiv 2505.05470): whether an image shows the quoted text of its prompt.

rapidocr reads the image with the PP-OCR models of its wheel. A score is 1 − min(distance, L) / L, with the
Levenshtein distance between the read text and the quoted text of length L. Both are compared without spaces, in lower
case, in NFKC form and with one kind of apostrophe. Legend: N images and prompts.
"""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards.images import check_images

logger = logging.getLogger(__name__)

Definition = Literal["flow_grpo", "strict"]
PAIRS = ('""', "“”", "„“", "„”", "””", "«»", "»«", "「」", "『』", "＂＂")  # opening and closing quotation marks
CURLY = "“”„"  # a text between two of them contains none of them
QUOTED = re.compile("|".join(f"{p[0]}([^{CURLY if p[0] in CURLY else p}]*){p[1]}" for p in PAIRS))
MARK = re.compile(f"[{''.join(PAIRS)}]")
INCHES = re.compile('[0-9]["”＂]')
APOSTROPHES = str.maketrans(dict.fromkeys("‘’‛ʼ＇`´′", "'"))
REMEDY = 'write the text of the image as "text" or “text”, and inches as ″ (U+2033) or in words'
SAMPLE = "Read me"  # a working engine reads this in an image of it


class OCR:
    """The reward: rapidocr's engine, which reads images one by one, and a definition of the score."""

    def __init__(self, engine: Any, definition: Definition) -> None:
        self._engine, self._definition = engine, definition

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N], 0 to 1, of images uint8 [N, H, W, 3]; NaN if the prompt has no quoted text."""
        check_images("ocr", images, prompts)
        return np.array([self._score_one(*pair) for pair in zip(images, prompts, strict=True)], dtype=np.float32)

    def read(self, image: NDArray[np.uint8]) -> str:
        """The text in an image uint8 [H, W, 3], line by line from the top, without separators."""
        found = self._engine(np.ascontiguousarray(image[..., ::-1]))  # OpenCV's order of colours
        return "".join(getattr(found, "txts", None) or ())

    def _score_one(self, image: NDArray[np.uint8], prompt: str) -> float:
        try:
            texts = quoted(prompt)
        except ValueError as error:
            logger.warning("ocr: no score for %r: it %s", prompt, error)
            return float("nan")
        return similarity(self.read(image), texts, self._definition)


def similarity(read: str, texts: Sequence[str], definition: Definition) -> float:
    """Similarity of the read text and the quoted texts, 0 to 1.

    `flow_grpo` compares with the first quoted text, and gives 1 if the read text contains it. `strict` compares with
    all of them in order.
    """
    found, wanted = _plain(read), _plain(texts[0] if definition == "flow_grpo" else "".join(texts))
    distance = 0 if definition == "flow_grpo" and wanted in found else edit_distance(found, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions between two texts."""
    row = list(range(len(second) + 1))
    for at, letter in enumerate(first, 1):
        above, row[0] = row[0], at
        for place, other in enumerate(second, 1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (letter != other))
    return row[-1]


def quoted(prompt: str) -> list[str]:
    """The texts between the quotation marks of a prompt, without blank ones.

    Raises:
        ValueError: its text continues "the prompt …"; there is no quoted text, or quotes are ambiguous.
    """
    found = list(QUOTED.finditer(prompt))
    if any(INCHES.match(prompt, max(0, match.start() - 1)) for match in found) or MARK.search(QUOTED.sub("", prompt)):
        raise ValueError(f"has an unmatched quotation mark, or one for inches; {REMEDY}")
    texts = ["".join(group or "" for group in match.groups()) for match in found]
    if not any(map(_plain, texts)):
        raise ValueError(f"has no quoted text, which ocr needs; {REMEDY}, or remove the prompt")
    return [text for text in texts if _plain(text)]


def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt without clear quoted text."""
    quoted(prompt)


def build(definition: Definition = "flow_grpo", device: str = "cpu") -> OCR:
    """The reward on `device`: cpu, cuda or cuda:N. ValueError, in one line, if rapidocr does not work on it."""
    if definition not in get_args(Definition):
        raise ValueError(f"definition: {definition!r} given; allowed are {', '.join(get_args(Definition))}")
    reward = OCR(_engine(device), definition)
    read = reward.read(_picture_of(SAMPLE))
    if _plain(read) != _plain(SAMPLE):
        raise ValueError(f"reward ocr: rapidocr reads {read!r} in an image of {SAMPLE!r}; reinstall it")
    return reward


def _engine(device: str) -> Any:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise ValueError(f"device: {device!r} given; ocr allows cpu, cuda and cuda:N")
    try:
        import onnxruntime
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError(f"reward ocr: {one_line(error)}; pip install rapidocr onnxruntime") from error
    import torch

    if kind == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ValueError(
            f"device: {device} given, but this onnxruntime has no CUDA; pip install onnxruntime-gpu instead"
        )
    runtime = "EngineConfig.onnxruntime"
    return RapidOCR(
        params={
            "Global.log_level": "critical",  # else it warns of every image without text
            "Global.use_cls": False,  # detection of upside-down text, which Flow-GRPO does not use either
            f"{runtime}.intra_op_num_threads": torch.get_num_threads(),  # the reward's `threads`
            f"{runtime}.use_cuda": kind == "cuda",
            f"{runtime}.cuda_ep_cfg.device_id": int(number or 0),
            f"{runtime}.cuda_ep_cfg.cudnn_conv_algo_search": "DEFAULT",  # a timed search is not deterministic
        }
    )


def _picture_of(text: str) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).text((24, 96), text, "black", ImageFont.load_default(48))
    return np.array(picture)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).split()).lower()
