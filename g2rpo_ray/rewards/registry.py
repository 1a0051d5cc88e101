"""The reward protocol, and rewards by name. A model's file, and what it imports, is loaded when it is built."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.files import resolve
from g2rpo_ray.words import one_line


class NotScores(ValueError):
    """What a reward returned can never be scores: asking again does not help."""


@runtime_checkable
class Reward(Protocol):
    """What the rewards actor calls. The caller decides how many pictures are scored together."""

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N], higher is better, of images uint8 [N, H, W, 3], each with its own prompt.

        NaN where one picture could not be scored: a missing score is never 0. A reward that has a third argument
        `metadata` is given a mapping for each prompt, what its file says of it: see `data.read_records`. One whose
        `scope` is "group" is given all pictures at once that credit compares, of one prompt; without it, any of them.
        """
        ...


PARTS = ("unified_reward_2", "soft_tifa")
"""Kinds with an option `part` whose `score_parts` gives the scores of all parts, by name, for the price of one."""
KINDS = {
    "hpsv2": "g2rpo_ray.rewards.hpsv2:build",
    "hpsv3": "g2rpo_ray.rewards.hpsv3:build",
    "colour_accuracy": "g2rpo_ray.quickstart.rules:colour_accuracy",
    "shape_accuracy": "g2rpo_ray.quickstart.rules:shape_accuracy",
    "scenes_attributes": "g2rpo_ray.scenes.rules:scenes_attributes",
    "scenes_relation": "g2rpo_ray.scenes.rules:scenes_relation",
    "scenes_count": "g2rpo_ray.scenes.rules:scenes_count",
    "scenes_correct": "g2rpo_ray.scenes.rules:scenes_correct",
    "scenes_quality": "g2rpo_ray.scenes.fidelity:quality",
    "scenes_background": "g2rpo_ray.scenes.fidelity:background",
    "clip": "g2rpo_ray.rewards.clip:build",
    "pickscore": "g2rpo_ray.rewards.pickscore:build",
    "imagereward": "g2rpo_ray.rewards.imagereward:build",
    "geneval": "g2rpo_ray.rewards.geneval:build",
    "ocr": "g2rpo_ray.rewards.ocr:build",
    "aesthetic": "g2rpo_ray.rewards.aesthetic:build",
    "unified_reward": "g2rpo_ray.rewards.unified_reward:build",
    "unified_reward_2": "g2rpo_ray.rewards.unified_reward_2:build",
    "soft_tifa": "g2rpo_ray.rewards.soft_tifa:build",
    "judge": "g2rpo_ray.rewards.judge:build",
    "pairwise": "g2rpo_ray.rewards.pairwise:build",
    "jpeg_compressibility": "g2rpo_ray.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "g2rpo_ray.rewards.jpeg:incompressibility",
}


def build_reward(kind: str, **options: Any) -> Reward:
    """The reward that `kind` names: one of KINDS, or a factory of yours as "module:factory".

    `options` go to the factory, names of embedded files made into paths. ValueError in one line where kind or an option
    can't be used.
    """
    factory = _factory(kind)
    options = {name: resolve(value) if isinstance(value, str) else value for name, value in options.items()}
    try:
        signature(factory).bind(**options)
    except TypeError as error:
        allowed = ", ".join(signature(factory).parameters) or "none"
        raise ValueError(f"reward {kind}: {error}; its options: {allowed}") from error
    try:
        reward = factory(**options)
    except ValueError:
        raise  # it names the option
    except (
        Exception,
        SystemExit,
    ) as error:  # a factory of the user's: whatever it raises, the message names the reward
        raise ValueError(f"reward {kind}: its factory raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(reward, Reward):
        raise ValueError(f"reward {kind}: its factory gave a {type(reward).__name__}; expected score(images, prompts)")
    return reward


def _factory(kind: str) -> Callable[..., Reward]:
    module_name, separator, name = KINDS.get(kind, kind).partition(":")
    if not separator:
        raise ValueError(f"reward kind: {kind!r} is not one of {', '.join(KINDS)}, nor a factory as 'module:factory'")
    try:
        factory: Callable[..., Reward] = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything, or end the process
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"reward kind: {kind!r} can't be imported ({reason}); install or correct it") from error
    return factory


def ask(
    reward: Reward,
    images: NDArray[np.uint8],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> NDArray[np.float32]:
    """The reward's scores [N] of images [N, H, W, 3]; it is told the `metadata` of the prompts if it asks for that.

    Raises:
        NotScores: what it returned is no float32 array of that length.
    """
    return _checked(reward.score(images, prompts, **_told(reward.score, prompts, metadata)), len(images))


def ask_parts(
    reward: Reward,
    images: NDArray[np.uint8],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """The same of all parts that the reward has, by name; of one without parts under ""."""
    all_parts = getattr(reward, "score_parts", None)
    if all_parts is None:
        return {"": ask(reward, images, prompts, metadata)}
    found = all_parts(images, prompts, **_told(all_parts, prompts, metadata))
    return {part: _checked(scores, len(images)) for part, scores in found.items()}


def _told(method: Callable[..., Any], prompts: Sequence[str], metadata: Any) -> dict[str, Any]:
    return {"metadata": metadata or [{}] * len(prompts)} if "metadata" in signature(method).parameters else {}


def _checked(scores: Any, count: int) -> NDArray[np.float32]:
    if not isinstance(scores, np.ndarray):
        given = f"a {type(scores).__name__}"
    elif scores.dtype != np.float32 or scores.shape != (count,):
        given = f"an array of {scores.dtype} and shape {scores.shape}"
    else:
        return scores
    raise NotScores(f"score() returned {given}; expected a numpy array of float32 and shape ({count},)")
