"""GenEval's rules (arXiv 2310.11513), which compare detected objects with a prompt's specification.

A specification has GenEval's published format: `{"tag": "color_attr", "include": [{"class": "cat",
"count": 1, "color": "red"}, {"class": "dog", "count": 1, "position": ["left of", 0]}], "exclude": [{"class": "cat",
"count": 2}]}`. `position` is a relation to another clause of `include`. This module loads no network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from g2rpo_ray.messages import one_line

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MAX_OBJECTS = 16  # per class, those with the highest scores
POSITION_THRESHOLD = 0.1  # minimum distance of two objects' centres, as a share of their sizes
Definition = Literal["graded", "strict", "published"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]


class Clause(BaseModel):
    """A number of objects of a class, optionally with colour and position."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1, le=MAX_OBJECTS + 1)
    color: Colour | None = None
    position: tuple[Relation, NonNegativeInt] | None = None


class Specification(BaseModel):
    """The objects that an image must and must not show."""

    model_config = ConfigDict(frozen=True)
    tag: str = ""
    include: tuple[Clause, ...] = ()
    exclude: tuple[Clause, ...] = ()

    @model_validator(mode="after")
    def _makes_sense(self) -> "Specification":
        if not self.include:
            raise ValueError("include is empty; give at least one object")
        if any(clause.position and clause.position[1] >= at for at, clause in enumerate(self.include)):
            raise ValueError("position must name an earlier clause of include, counted from 0")
        return self


def parse_specification(metadata: Mapping[str, Any]) -> Specification:
    """The specification in a prompt's metadata. ValueError, in one line, if it is missing or wrong."""
    if not metadata:
        raise ValueError("has no metadata; geneval needs include, tag and exclude for each prompt, see docs/rewards.md")
    try:
        return Specification.model_validate(dict(metadata))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"has wrong metadata: {place + ': ' if place else ''}{one_line(first['msg'])}") from None


def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt whose images can never be scored."""
    parse_specification(metadata)


@dataclass(frozen=True, slots=True)
class Found:
    """A detected object."""

    score: float
    box: NDArray[np.float64]  # left, top, right, bottom, in pixels
    mask: NDArray[np.bool_] | None = None  # [H, W] of the image


Objects = Mapping[str, Sequence[Found]]
"""Detected objects by class, the highest score first."""
NameColours = Callable[[str, Sequence[Found]], Sequence[str]]
"""Function of a class and its objects to their colours."""


def keep(objects: Objects, threshold: float, max_overlap: float) -> dict[str, list[Found]]:
    """Objects above the threshold, at most MAX_OBJECTS per class, without those that overlap a better one.

    Args:
        objects: by class, the highest score first.
        threshold: minimum score.
        max_overlap: intersection over union from which the worse object is dropped; 1 keeps all.
    """
    kept: dict[str, list[Found]] = {}
    for name, found in objects.items():
        chosen: list[Found] = []
        for one in [one for one in found if one.score > threshold][:MAX_OBJECTS]:
            if max_overlap == 1 or all(overlap(one.box, other.box) < max_overlap for other in chosen):
                chosen.append(one)
        kept[name] = chosen
    return kept


def overlap(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Intersection over union of two boxes, which include their last pixel, as published."""

    def area(low: NDArray[np.float64], high: NDArray[np.float64]) -> float:
        return float(np.prod(np.maximum(high - low + 1, 0)))

    common = area(np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:]))
    union = area(first[:2], first[2:]) + area(second[:2], second[2:]) - common
    return common / union if union else 0.0


def relations(subject: Found, target: Found) -> set[str]:
    """Relations of the subject to the target; empty if their centres are too close for their sizes."""
    boxes = np.stack([subject.box, target.box]).reshape(2, 2, 2)
    offset = np.subtract(*boxes.mean(axis=1))
    slack = POSITION_THRESHOLD * np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    apart = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def judge(wanted: Specification, objects: Objects, colours: NameColours, definition: Definition) -> float:
    """The score of an image: 1 or 0 by `published` and `strict`, at most 1 by `graded`; see docs/rewards.md."""
    return (
        _published(wanted, objects, colours)
        if definition == "published"
        else _flow_grpo(wanted, objects, colours, definition == "strict")
    )


def _published(wanted: Specification, objects: Objects, colours: NameColours) -> float:
    """GenEval's score: enough objects, the best ones with the colour and position, and fewer than in `exclude`."""
    groups: list[Sequence[Found]] = []  # the objects of each clause, empty if it does not hold
    for clause in wanted.include:
        best = objects.get(clause.name, ())[: clause.count]
        holds = len(best) == clause.count
        if holds and clause.color:
            holds = list(colours(clause.name, best)).count(clause.color) == clause.count
        if holds and clause.position:
            holds = _in_place(best, groups, clause.position)
        groups.append(best if holds else ())
    too_many = any(len(objects.get(clause.name, ())) >= clause.count for clause in wanted.exclude)
    return float(all(groups) and not too_many)


def _flow_grpo(wanted: Specification, objects: Objects, colours: NameColours, strict: bool) -> float:
    """Flow-GRPO's score (its reward-server): exact numbers; `exclude` is ignored.

    Graded: the mean over counts, colours and positions. A count or colour scores 1 − |wanted − found| / wanted, which
    is negative for more than twice as many. A wrong position counts as a 0 and a 1, as released.
    """
    groups: list[Sequence[Found]] = []
    parts: list[float] = []
    for clause in wanted.include:
        found = objects.get(clause.name, ())
        parts.append(1 - abs(clause.count - len(found)) / clause.count)
        holds = len(found) == clause.count
        if not holds:
            parts += [0.0] if clause.color or clause.position else []
        if holds and clause.color:
            there = list(colours(clause.name, found)).count(clause.color)
            parts.append(1 - abs(clause.count - there) / clause.count)
            holds = there == clause.count
        if holds and clause.position:
            holds = _in_place(found, groups, clause.position)
            parts += [1.0] if holds else [0.0, 1.0] if groups[clause.position[1]] else [0.0]
        groups.append(found if holds else ())
    return float(all(groups)) if strict else sum(parts) / len(parts)


def _in_place(found: Sequence[Found], groups: Sequence[Sequence[Found]], position: tuple[str, int]) -> bool:
    """True if all objects have the relation to all objects of an earlier clause, which must hold."""
    relation, target = position
    return bool(groups[target]) and all(relation in relations(one, other) for one in found for other in groups[target])
