"""The reward protocol, and rewards by name. A model's file, and what it imports, is loaded when it is built."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from g2rpo_ray.functions import PYTHON
from g2rpo_ray.imports import imported
from g2rpo_ray.messages import one_line, shown
from g2rpo_ray.paths import resolve

if TYPE_CHECKING:  # not loaded with the package, which `python -m g2rpo_ray.rewards` loads before its entry
    import numpy as np
    from numpy.typing import NDArray

    from g2rpo_ray.config import RewardConfig
    from g2rpo_ray.config.schema import Frames


class NotScores(ValueError):
    """A reward returned something that cannot be scores; a retry would not help."""


@runtime_checkable
class Reward(Protocol):
    """The protocol of a reward. The caller decides how many images are scored together."""

    def score(self, images: "NDArray[np.uint8]", prompts: Sequence[str]) -> "NDArray[np.float32]":
        """Scores [N], higher is better, of images uint8 [N, H, W, 3], each with its own prompt.

        An array, tensor or list. NaN or None where one picture could not be scored: a missing score is never 0. A
        reward that has a third argument `metadata` is given a mapping for each prompt, what its file says of it: see
        `data.read_records`. Of a prompt with pictures it has them, too, uint8 [H, W, 3] and each of its own size:
        `source`, a tuple of them, `target`, `mask`. One whose `scope` is "group" is given all pictures at once that
        credit compares, of one prompt; without it, any of them. One whose `scope` is "video" is given videos
        [N, F, H, W, 3], with F = 1 of a model of pictures; others are given a frame of each video at a time, and the
        mean counts. One that asks somebody else may have `waits`, the most seconds that a question takes and how many
        are asked at a time: its server isn't taken for hung before it has had that time for every picture.
        """
        ...


PARTS = ("unified_reward_2", "soft_tifa")
"""Kinds with an option `part` whose `score_parts` gives the scores of all parts, by name, for the price of one."""
KINDS = {
    "hpsv2": "g2rpo_ray.rewards.hpsv2:build",
    "hpsv3": "g2rpo_ray.rewards.hpsv3:build",
    "colour_accuracy": "g2rpo_ray.worlds.quickstart.rules:colour_accuracy",
    "shape_accuracy": "g2rpo_ray.worlds.quickstart.rules:shape_accuracy",
    "scenes_attributes": "g2rpo_ray.worlds.scenes.rules:scenes_attributes",
    "scenes_relation": "g2rpo_ray.worlds.scenes.rules:scenes_relation",
    "scenes_count": "g2rpo_ray.worlds.scenes.rules:scenes_count",
    "scenes_correct": "g2rpo_ray.worlds.scenes.rules:scenes_correct",
    "scenes_quality": "g2rpo_ray.worlds.scenes.fidelity:quality",
    "scenes_background": "g2rpo_ray.worlds.scenes.fidelity:background",
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
    "answer_tokens": "g2rpo_ray.rewards.answer_tokens:build",
    "pairwise": "g2rpo_ray.rewards.pairwise:build",
    "preservation": "g2rpo_ray.rewards.preservation:build",
    "preservation_dino": "g2rpo_ray.rewards.preservation:build_dino",
    "dynamic_degree": "g2rpo_ray.rewards.motion:dynamic_degree",
    "temporal_consistency": "g2rpo_ray.rewards.motion:temporal_consistency",
    "jpeg_compressibility": "g2rpo_ray.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "g2rpo_ray.rewards.jpeg:incompressibility",
}


def open_reward(config: "RewardConfig") -> Reward:
    """The reward of a section of the settings, on the section's device if its factory has an argument `device`."""
    placed = {"device": config.device} if "device" in signature(_factory(config.kind)).parameters else {}
    return build_reward(config.kind, **(placed | config.options))


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


def from_python(function: Any) -> Reward:
    """A reward that the caller gave as `score(images, prompts)`, or as an object that has it.

    Raises:
        ValueError: one line; the settings are a file's, which has its name alone.
    """
    if isinstance(function, Reward):
        return function
    if not callable(function):
        raise ValueError(f"options.function: {one_line(function)}")
    return SimpleNamespace(score=function)


def _factory(kind: str) -> Callable[..., Reward]:
    if kind == PYTHON:
        return from_python
    if kind not in KINDS and ":" not in kind:
        raise ValueError(f"reward kind: {kind!r} is not one of {', '.join(KINDS)}, nor a factory as 'module:factory'")
    try:
        factory: Callable[..., Reward] = imported(KINDS.get(kind, kind))
    except ValueError as error:
        raise ValueError(f"reward kind: {error}") from error
    return factory


def ask(
    reward: Reward,
    images: "NDArray[np.uint8]",
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    frames: "Frames" = "all",
) -> "NDArray[np.float32]":
    """The reward's scores [N] of images [N, H, W, 3] or videos [N, F, H, W, 3].

    It is told the `metadata` of the prompts if it asks for that. It may return an array, a tensor or a list, in which
    None is a missing score.

    Args:
        frames: of a video, those whose mean score counts, for a reward of pictures.

    Raises:
        NotScores: what it returned is not as many numbers.
    """
    given = _texts(prompts), _told(reward.score, prompts, metadata)
    return _mean(
        [_checked(reward.score(each, given[0], **given[1]), len(each)) for each in _takes(reward, images, frames)]
    )


def ask_parts(
    reward: Reward,
    images: "NDArray[np.uint8]",
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    frames: "Frames" = "all",
) -> "dict[str, NDArray[np.float32]]":
    """The same of all parts that the reward has, by name; of one without parts under ""."""
    all_parts = getattr(reward, "score_parts", None)
    if all_parts is None:
        return {"": ask(reward, images, prompts, metadata, frames)}
    texts, told = _texts(prompts), _told(all_parts, prompts, metadata)
    found = [all_parts(each, texts, **told) for each in _takes(reward, images, frames)]
    return {part: _mean([_checked(scores[part], len(images)) for scores in found]) for part in found[0]}


def ask_in_chunks(
    reward: Reward,
    images: "NDArray[np.uint8]",
    prompt: str,
    metadata: Mapping[str, Any],
    size: int,
    frames: "Frames" = "all",
) -> "dict[str, NDArray[np.float32]]":
    """`ask_parts` of all images of one unit, at most `size` at a time.

    A forward pass holds these images alone, in chunks of a fixed size: the last bits of a matrix product depend on its
    batch, and a score must not depend on what else was waiting.
    """
    import numpy as np

    chunks = [images[at : at + size] for at in range(0, len(images), size)]
    found = [ask_parts(reward, chunk, [prompt] * len(chunk), [metadata] * len(chunk), frames) for chunk in chunks]
    return {part: np.concatenate([scores[part] for scores in found]) for part in found[0]}


def scores_of(config: "RewardConfig", answer: "Mapping[str, NDArray[np.float32]]") -> "NDArray[np.float32]":
    """The scores of an answer by part that the reward of this section uses."""
    return answer[""] if "" in answer else answer[config.options["part"]]


def _takes(reward: Reward, images: "NDArray[np.uint8]", frames: "Frames") -> "list[NDArray[np.uint8]]":
    """What the reward is given, one after the other: of videos, if it judges pictures, a frame of each at a time."""
    if getattr(reward, "scope", "image") == "video":
        return [images if images.ndim == 5 else images[:, None]]
    if images.ndim == 4:
        return [images]
    named = {"all": range(images.shape[1]), "first": (0,), "last": (-1,)}
    return [images[:, frame] for frame in (named[frames] if isinstance(frames, str) else frames)]


def _mean(scores: "Sequence[NDArray[np.float32]]") -> "NDArray[np.float32]":
    """Of the frames' scores [N]; where one is missing, all are."""
    import numpy as np

    return np.mean(scores, axis=0, dtype=np.float32)


def _told(method: Callable[..., Any], prompts: Sequence[str], metadata: Any) -> dict[str, Any]:
    if "metadata" not in signature(method).parameters:
        return {}
    from g2rpo_ray.data.pictures import with_pictures

    known = metadata or [{}] * len(prompts)
    decoded = {id(one): with_pictures(one) for one in known}  # most are the same one
    return {"metadata": [decoded[id(one)] for one in known]}


def _texts(prompts: Sequence[str]) -> list[str]:
    from g2rpo_ray.types import text_of  # imports numpy: a command that only checks settings need not

    return [text_of(prompt) for prompt in prompts]


def _checked(scores: Any, count: int) -> "NDArray[np.float32]":
    import numpy as np

    if callable(getattr(scores, "detach", None)):  # a tensor, which may be a GPU's, or bfloat16, unknown to numpy
        scores = scores.detach().float().cpu()
    try:
        found = np.asarray(scores)
        numbers = found.astype(np.float32) if found.dtype.kind in "fiubO" else None
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or numbers.shape != (count,):
        raise NotScores(f"score() returned {one_line(shown(scores), 80)}; expected {count} numbers, one an image")
    return numbers
