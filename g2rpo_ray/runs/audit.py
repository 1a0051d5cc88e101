"""The audit of a run: digests of what each iteration computed, which a replay must find again.

A line of `audit.jsonl` is an iteration. A unit is a function of its arguments, so the file is the same on any number of
actors and after a resume. Shapes as in `g2rpo_ray.types`.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.algo.tree import ANCHOR
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.runs.tracking import split_lines
from g2rpo_ray.types import Branches, FloatArray, Images, PromptRollout, Trunk

AUDIT = "audit.jsonl"
Digests = Mapping[str, str]
"""By part of a unit's result: `latents`, `velocities` or `log_prob`, `images`."""


def digests(result: Trunk | Branches | None, images: Images) -> Digests:
    """16 hex digits of the SHA-256 of each array that a unit computed: shape, dtype and bytes."""
    arrays = {} if result is None else {part.name: getattr(result, part.name) for part in fields(result)}
    found = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}  # the others are the plan's
    return {name: _digest(array) for name, array in {**found, "images": images}.items()}


def _digest(array: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{array.shape}\0{array.dtype.str}\0".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def audit_line(
    weights: str, units: Mapping[str, Digests], rewards: Sequence[str], prompts: Sequence[PromptRollout]
) -> dict[str, Any]:
    """What an iteration sampled and scored. The caller adds `lora`, the checksum of what is published after it.

    Args:
        weights: checksum of the LoRA that sampled.
        units: by name.
        rewards: names of the trained rewards.
    """
    scores = {
        name: [_packed(prompt.scores[row][_own(prompt)]) for prompt in prompts] for row, name in enumerate(rewards)
    }
    return {"weights": weights, "units": dict(units), "scores": scores}


def read_audit(run: Folder) -> dict[int, dict[str, Any]]:
    """The lines of a run's audit by iteration, counted from 1; those that are damaged are left out.

    Raises:
        ValueError: one line; the run has none.
    """
    if not run.exists(AUDIT):
        raise ValueError(f"{run} has no {AUDIT}: it is no run's folder, or of a version that did not write it yet")
    lines, _ = split_lines(run.read(AUDIT), "iteration")
    return {line["iteration"]: line for line in lines if {"weights", "units", "scores", "lora"} <= line.keys()}


def take_scores(
    line: Mapping[str, Any], names: Sequence[str], rewards: Sequence[str], prompts: Sequence[PromptRollout]
) -> None:
    """Put the recorded scores of these rewards into the rollouts."""
    for name in names:
        for prompt, packed in zip(prompts, line["scores"][name], strict=True):
            prompt.scores[rewards.index(name), _own(prompt)] = _unpacked(packed)


def first_difference(
    recorded: Mapping[str, Any], found: Mapping[str, Any], prompts: Sequence[PromptRollout]
) -> str | None:
    """The first difference of an iteration's line, in words: weights, units in the order of `found`, scores, `lora`."""
    if recorded["weights"] != found["weights"]:
        return f"the LoRA that samples: {recorded['weights'][:12]} recorded, {found['weights'][:12]} now"
    for name, parts in found["units"].items():
        known = recorded["units"].get(name, {})
        if differing := [part for part, digest in parts.items() if known.get(part) != digest]:
            return f"unit {name}, its {differing[0]}; prompt {prompts[int(name.split('/')[2])].prompt!r}"
    for name, packed in found["scores"].items():
        for prompt, then, now in zip(prompts, recorded["scores"][name], packed, strict=True):
            if difference := _differing_score(prompt, _unpacked(then), _unpacked(now)):
                return f"reward {name}, {difference}; prompt {prompt.prompt!r}"
    if found.get("lora", recorded["lora"]) != recorded["lora"]:
        return f"the update: LoRA {recorded['lora'][:12]} recorded, {found['lora'][:12]} now"
    return None


def _differing_score(prompt: PromptRollout, then: FloatArray, now: FloatArray) -> str | None:
    differ = np.flatnonzero(~((then == now) | (np.isnan(then) & np.isnan(now))))
    if not differ.size:
        return None
    tree, at = prompt.tree, int(differ[0])
    leaf = int(np.flatnonzero(_own(prompt))[at])
    of = next(subtree for subtree in tree.subtrees if leaf in subtree.leaves)
    image = f"root {of.root}, branch step {of.branch_step}, child {of.child}, λ={tree.strides[tree.tag[leaf]]}"
    return f"the image of {image}: {then[at]:.9g} recorded, {now[at]:.9g} now"


def _own(prompt: PromptRollout) -> NDArray[np.bool_]:
    """[Q]: the leaves that credit compares; nothing is learned from anchors."""
    return prompt.tree.tag != ANCHOR


def _packed(scores: FloatArray) -> str:
    """Little-endian float32 in base64: all bits, in half of the characters of decimals."""
    return base64.b64encode(scores.astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
