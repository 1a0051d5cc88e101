"""The reward protocol, and rewards by name. A model's file, and what it imports, is loaded when it is built."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.files import EMBEDDED, resolve


@runtime_checkable
class Reward(Protocol):
    """What the rewards actor calls. The caller decides how many pictures are scored together."""

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N], higher is better, of images uint8 [N, H, W, 3], each with its own prompt.

        NaN where one picture could not be scored: a missing score is never 0.
        """
        ...


KINDS = {
    "hpsv2": "g2rpo_ray.rewards.hpsv2:build",
    "colour_accuracy": "g2rpo_ray.rewards.shapes:colour_accuracy",
    "shape_accuracy": "g2rpo_ray.rewards.shapes:shape_accuracy",
}


def build_reward(kind: str, **options: Any) -> Reward:
    """The reward that `kind` names: one of KINDS, or a factory of yours as "module:factory".

    `options` go to the factory, names of embedded files made into paths. ValueError in one line where kind or an option
    can't be used.
    """
    factory = _factory(kind)
    options = {name: resolve(value) if isinstance(value, str) else value for name, value in options.items()}
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        allowed = ", ".join(inspect.signature(factory).parameters) or "none"
        raise ValueError(f"reward {kind}: {error}; its options: {allowed}") from error
    reward: Reward = factory(**options)
    return reward


def check_reward(key: str, kind: str, options: Mapping[str, Any]) -> list[str]:
    """What can be told of a reward without loading its model; a line for what could not.

    Raises:
        ValueError: one line that names the key in the configuration, what was given and what is allowed.
    """
    if kind not in KINDS and ":" not in kind:
        raise ValueError(f"{key}.kind: {kind!r} given; allowed are {', '.join(KINDS)}, or a factory as module:factory")
    checkpoint = str(options.get("checkpoint", ""))
    if kind not in KINDS or not checkpoint or Path(resolve(checkpoint)).is_file():
        return []
    if checkpoint.count(":") == 1 and not checkpoint.startswith(EMBEDDED):
        return [f"{key}.options.checkpoint: {checkpoint} is taken for a file on the hub, looked for at start"]
    raise ValueError(f"{key}.options.checkpoint: no file {checkpoint}; give a path, or a hub file as repo:file")


def _factory(kind: str) -> Callable[..., Reward]:
    module_name, separator, name = KINDS.get(kind, kind).partition(":")
    if not separator:
        raise ValueError(f"reward kind: {kind!r} is not one of {', '.join(KINDS)}, nor a factory as 'module:factory'")
    try:
        factory: Callable[..., Reward] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward kind: {kind!r} can't be imported ({error}); install or correct it") from error
    return factory
