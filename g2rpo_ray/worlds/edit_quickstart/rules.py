"""Rule-based rewards for edits: the edit is done, and the rest is as in the source.

From pixels alone, by the quickstart's rules for colour and shape; 1 for yes, 0 for no.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.types import sources_in
from g2rpo_ray.worlds.edit_quickstart.draw import ATTRIBUTES, IMAGE_SIZE, PLACES, Edit, parse, quarters
from g2rpo_ray.worlds.quickstart.rules import MIN_CONTRAST, MIN_FOREGROUND, seen_colour, seen_shape
from g2rpo_ray.worlds.quickstart.shapes import BACKGROUND

Seen = Mapping[str, str | None]
"""Values of the attributes; None where none is recognised."""
NOTHING: Seen = dict.fromkeys(ATTRIBUTES)


def seen(picture: NDArray[np.uint8]) -> Seen:
    """What a picture uint8 [64, 64, 3] shows; nothing where a shape is in no quarter, or something in several."""
    parts = [part.astype(np.float32) for part in quarters(picture)]
    contrast = [np.linalg.norm(part - np.array(BACKGROUND, np.float32), axis=2) for part in parts]
    filled = [at for at, part in enumerate(contrast) if (part > MIN_CONTRAST).sum() >= MIN_FOREGROUND]
    if len(filled) != 1:
        return NOTHING
    (at,) = filled
    return {"colour": seen_colour(parts[at]), "shape": seen_shape(parts[at]), "place": PLACES[at]}


@dataclass(frozen=True, slots=True)
class EditReward:
    """1 where `judge` says so of what result and source show; NaN without a source or an instruction of this world."""

    judge: Callable[[Edit, Seen, Seen], bool]

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        """Scores float32 [N] of images uint8 [N, 64, 64, 3]."""
        if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"images have shape {images.shape}, but the edit rewards take [N, 64, 64, 3]")
        return np.array([self._one(*each) for each in zip(images, prompts, metadata, strict=True)], np.float32)

    def _one(self, image: NDArray[np.uint8], prompt: str, known: Mapping[str, Any]) -> float:
        try:
            edit = parse(prompt)
        except ValueError:
            return float("nan")
        sources = sources_in(known)
        return float(self.judge(edit, seen(image), seen(sources[0]))) if sources else float("nan")


def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt that is not an instruction of this world, or has no source."""
    parse(prompt)
    if not sources_in(metadata):
        raise ValueError("has no source picture, which the result is compared with; set model.sources")


def edit_done() -> EditReward:
    """1 where the attribute that the instruction names has the new value."""
    return EditReward(lambda edit, result, source: result[edit.attribute] == edit.value)


def rest_kept() -> EditReward:
    """1 where all other attributes are recognised and have the source's values."""

    def kept(edit: Edit, result: Seen, source: Seen) -> bool:
        others = [attribute for attribute in ATTRIBUTES if attribute != edit.attribute]
        return all(result[attribute] is not None and result[attribute] == source[attribute] for attribute in others)

    return EditReward(kept)
