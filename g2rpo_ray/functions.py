"""Rewards that are given as Python objects: in settings, and by a digest in files, which cannot hold them."""

import hashlib
from collections.abc import Mapping
from types import CodeType
from typing import Any

PYTHON = "python"
"""Kind of a reward that is a function or an object of the caller's, in its option `function`."""


def as_settings(reward: Any) -> Any:
    """The settings of a reward that was given as a function, or as an object that has `score`; others as they are.

    It takes no resources of Ray's: give {"kind": function, "resources": {"GPU": 1}} for one that does.
    """
    if not isinstance(reward, Mapping):
        return {"kind": PYTHON, "options": {"function": reward}, "resources": {}} if _is_reward(reward) else reward
    if _is_reward(reward.get("kind")):
        return {"resources": {}, **reward, "kind": PYTHON, "options": {"function": reward["kind"]}}
    return reward


def _is_reward(given: Any) -> bool:
    return not isinstance(given, type) and (callable(given) or callable(getattr(given, "score", None)))


def value_in_words(value: Any) -> Any:
    """An option as it is written to a file: a function as its name and a digest of its code, others unchanged."""
    if not _is_reward(value):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    code = getattr(value, "__code__", None)
    digest = hashlib.sha256(repr(_content(code)).encode()).hexdigest()[:12] if code else "no code"
    return f"{name} ({digest}), which only Python can give: train(config, rewards={{...}})"


def _content(code: CodeType) -> tuple[Any, ...]:
    """The code of a function, without its place in a file."""
    constants = [_content(part) if isinstance(part, CodeType) else part for part in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants
