"""The protocol of rewards, and rewards by name. The file of a model is imported when the reward is built."""

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
    """A reward returned a value that is not scores; a retry would not help."""


@runtime_checkable
class Reward(Protocol):
    """The protocol of a reward. The caller decides how many images are scored together."""

    def score(self, images: "NDArray[np.uint8]", prompts: Sequence[str]) -> "NDArray[np.float32]":
        """Scores [N], higher is better, of images uint8 [N, H, W, 3], each with its own prompt.

        Returns an array, tensor or list, with NaN or None for a missing score, which is never 0.

        Optional parts of the protocol:
            metadata: a third argument, a mapping for each prompt with its metadata: see `data.read_records`. For edits
                it has decoded images uint8 [H, W, 3], each in its own size: `source` (a tuple), `target`, `mask`.
            scope: an attribute. "group": a call gets all images of one comparison group, of one prompt. "video": a
                call gets videos [N, F, H, W, 3], with F = 1 for a model of images. Other rewards get one frame of each
                video at a time, and the scores of frames are averaged. F counts the frames that the section names.
            waits: an attribute (seconds, at_once) of a reward that calls another service: the maximum seconds of a
                request about one image, and the concurrent requests. Its server counts as hung only after this time.
        """
        ...


PARTS = ("unified_reward_2", "soft_tifa", "videoalign")
"""Kinds with an option `part`, whose `score_parts` returns the scores of all parts, by name, at the cost of one."""
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
    "edit_done": "g2rpo_ray.worlds.edit_quickstart.rules:edit_done",
    "rest_kept": "g2rpo_ray.worlds.edit_quickstart.rules:rest_kept",
    "motion_direction": "g2rpo_ray.worlds.video_quickstart.rules:motion_direction",
    "motion_thing": "g2rpo_ray.worlds.video_quickstart.rules:motion_thing",
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
    "videoalign": "g2rpo_ray.rewards.videoalign:build",
    "dynamic_degree": "g2rpo_ray.rewards.motion:dynamic_degree",
    "temporal_consistency": "g2rpo_ray.rewards.motion:temporal_consistency",
    "jpeg_compressibility": "g2rpo_ray.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "g2rpo_ray.rewards.jpeg:incompressibility",
}


def open_reward(config: "RewardConfig", device: str | None = None) -> Reward:
    """The reward of a section of the settings; if its factory has an argument `device`, on that, by default its own."""
    placed = {"device": device or config.device} if "device" in signature(_factory(config.kind)).parameters else {}
    return build_reward(config.kind, **(placed | config.options))


def build_reward(kind: str, **options: Any) -> Reward:
    """The reward of a kind.

    Args:
        kind: one of KINDS, or the user's factory as "module:factory".
        options: arguments of the factory; names of embedded files become paths.

    Raises:
        ValueError: one line; the kind or an option cannot be used.
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
    ) as error:  # a user's factory may raise anything
        raise ValueError(f"reward {kind}: its factory raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(reward, Reward):
        raise ValueError(f"reward {kind}: its factory returned {type(reward).__name__}, without score(images, prompts)")
    return reward


def from_python(function: Any) -> Reward:
    """A reward from a function `score(images, prompts)`, or from an object with such a method.

    Raises:
        ValueError: one line; the settings are from a file, which has only the function's name.
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
        raise ValueError(f"reward kind: {kind!r} given; allowed are {', '.join(KINDS)}, or a factory 'module:factory'")
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
    """The reward's scores float32 [N] of images uint8 [N, H, W, 3] or videos uint8 [N, F, H, W, 3]; NaN if missing.

    Args:
        reward: its score may return an array, a tensor or a list with None.
        images: images or videos.
        prompts: N names of prompts.
        metadata: N mappings, passed on if the reward has an argument for it.
        frames: frames of a video that are scored; for a reward of images, the mean of their scores.

    Raises:
        NotScores: it did not return N numbers.
    """
    texts, more = _texts(prompts), _metadata_argument(reward.score, prompts, metadata)
    return _mean([_checked(reward.score(each, texts, **more), len(each)) for each in _takes(reward, images, frames)])


def ask_parts(
    reward: Reward,
    images: "NDArray[np.uint8]",
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    frames: "Frames" = "all",
) -> "dict[str, NDArray[np.float32]]":
    """Like `ask`, for all parts of the reward, by name; "" is the name for a reward without parts."""
    all_parts = getattr(reward, "score_parts", None)
    if all_parts is None:
        return {"": ask(reward, images, prompts, metadata, frames)}
    texts, more = _texts(prompts), _metadata_argument(all_parts, prompts, metadata)
    found = [all_parts(each, texts, **more) for each in _takes(reward, images, frames)]
    return {part: _mean([_checked(scores[part], len(images)) for scores in found]) for part in found[0]}


def ask_in_chunks(
    reward: Reward,
    images: "NDArray[np.uint8]",
    prompt: str,
    metadata: Mapping[str, Any],
    size: int,
    frames: "Frames" = "all",
) -> "dict[str, NDArray[np.float32]]":
    """`ask_parts` of all images of one unit, at most `size` per call.

    A call has images of this unit only, in chunks of a fixed size: the last bits of a matrix product depend on its
    batch, and a score must not depend on other units.
    """
    import numpy as np

    chunks = [images[at : at + size] for at in range(0, len(images), size)]
    found = [ask_parts(reward, chunk, [prompt] * len(chunk), [metadata] * len(chunk), frames) for chunk in chunks]
    return {part: np.concatenate([scores[part] for scores in found]) for part in found[0]}


def scores_of(config: "RewardConfig", answer: "Mapping[str, NDArray[np.float32]]") -> "NDArray[np.float32]":
    """The scores that a section's reward uses, of an answer by part."""
    return answer[""] if "" in answer else answer[config.options["part"]]


def _takes(reward: Reward, images: "NDArray[np.uint8]", frames: "Frames") -> "list[NDArray[np.uint8]]":
    """The inputs of the reward's calls: whole videos for a reward of videos, else one frame of each at a time."""
    whole = getattr(reward, "scope", "image") == "video"
    if images.ndim == 4:
        return [images[:, None] if whole else images]
    named = {"all": range(images.shape[1]), "first": (0,), "last": (-1,)}
    chosen = [*(named[frames] if isinstance(frames, str) else frames)]
    return [images[:, chosen]] if whole else [images[:, frame] for frame in chosen]


def _mean(scores: "Sequence[NDArray[np.float32]]") -> "NDArray[np.float32]":
    """Mean [N] of the frames' scores [N]; missing if one is missing."""
    import numpy as np

    return np.mean(scores, axis=0, dtype=np.float32)


def _metadata_argument(method: Callable[..., Any], prompts: Sequence[str], metadata: Any) -> dict[str, Any]:
    if "metadata" not in signature(method).parameters:
        return {}
    from g2rpo_ray.data.pictures import with_pictures

    known = metadata or [{}] * len(prompts)
    decoded = {id(one): with_pictures(one) for one in known}  # most are the same object
    return {"metadata": [decoded[id(one)] for one in known]}


def _texts(prompts: Sequence[str]) -> list[str]:
    from g2rpo_ray.types import text_of  # imports numpy, which checks of settings avoid

    return [text_of(prompt) for prompt in prompts]


def _checked(scores: Any, count: int) -> "NDArray[np.float32]":
    import numpy as np

    if callable(getattr(scores, "detach", None)):  # a tensor, perhaps on a GPU or in bfloat16
        scores = scores.detach().float().cpu()
    try:
        found = np.asarray(scores)
        numbers = found.astype(np.float32) if found.dtype.kind in "fiubO" else None
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or numbers.shape != (count,):
        raise NotScores(f"score() returned {one_line(shown(scores), 80)}; expected {count} numbers, one per image")
    return numbers
