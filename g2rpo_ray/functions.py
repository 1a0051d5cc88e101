"""Rewards that are Python objects: their settings, and their digests for files, which cannot hold objects."""

import hashlib
from collections.abc import Mapping
from types import CodeType
from typing import Any

PYTHON = "python"
"""The `kind` of a reward that is a Python function or object; its option `function` holds it."""


def as_settings(reward: Any) -> Any:
    """The settings of a reward that is a function or an object with a method `score`; other values are unchanged.

    Such a reward reserves no resources; for a GPU give {"kind": function, "resources": {"GPU": 1}}.
    """
    if not isinstance(reward, Mapping):
        return {"kind": PYTHON, "options": {"function": reward}, "resources": {}} if _is_reward(reward) else reward
    if _is_reward(reward.get("kind")):
        return {"resources": {}, **reward, "kind": PYTHON, "options": {"function": reward["kind"]}}
    return reward


def _is_reward(given: Any) -> bool:
    return not isinstance(given, type) and (callable(given) or callable(getattr(given, "score", None)))


def value_in_words(value: Any) -> Any:
    """An option's value for a file: for a function its name and a digest of its code; other values are unchanged."""
    if not _is_reward(value):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    code = getattr(value, "__code__", None)
    digest = hashlib.sha256(repr(_content(code)).encode()).hexdigest()[:12] if code else "no code"
    return f"{name} ({digest}), which only Python can give: train(config, rewards={{...}})"


def _content(code: CodeType) -> tuple[Any, ...]:
    """The parts of a function's code that do not depend on its file and line."""
    constants = [_content(part) if isinstance(part, CodeType) else part for part in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants
