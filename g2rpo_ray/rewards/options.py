"""Checks of a reward's options before the start, without importing its model's packages."""

import ast
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g2rpo_ray.functions import PYTHON
from g2rpo_ray.messages import shown
from g2rpo_ray.paths import path_fault, resolve
from g2rpo_ray.rewards.files import is_hub_file, is_hub_id
from g2rpo_ray.rewards.registry import KINDS, PARTS, build_reward

if TYPE_CHECKING:
    from g2rpo_ray.config import RewardConfig

REQUIRED = object()  # in place of a default
FILE_OPTIONS = ("checkpoint", "vocabulary")  # a path, or a file on the hub
FOLDER_OPTIONS = ("model", "processor", "backbone", "colour_model")  # a directory, or a repository on the hub
WITHOUT_WEIGHTS = (("hpsv3", "backbone"), ("videoalign", "backbone"), ("pickscore", "processor"))
"""Only tokenizer and configuration are read: the option, by kind."""
SERVER_OPTIONS = ("base_urls",)
PACKAGES = {
    "hpsv2": ("hpsv2", ", whose own pins are too old for the rest: pip install --no-deps hpsv2==1.2.0 clint args"),
    "ocr": ("rapidocr", ": pip install rapidocr onnxruntime, on a GPU onnxruntime-gpu in place of the latter"),
    **dict.fromkeys(("dynamic_degree", "temporal_consistency"), ("cv2", ": pip install opencv-python-headless")),
}
"""By kind: an additional package that must be installed, and how to install it."""
QUESTIONS = {
    "pairwise": "g2rpo_ray.rewards.pairwise:questions",
    "soft_tifa": "g2rpo_ray.rewards.soft_tifa:questions",
}
"""By kind: a function of the number of images and the metadata to the number of questions. Default: one per image."""
PROMPT_CHECKS = {
    "edit_done": "g2rpo_ray.worlds.edit_quickstart.rules:check_prompt",
    "rest_kept": "g2rpo_ray.worlds.edit_quickstart.rules:check_prompt",
    "motion_direction": "g2rpo_ray.worlds.video_quickstart.rules:check_prompt",
    "motion_thing": "g2rpo_ray.worlds.video_quickstart.rules:check_prompt",
    "ocr": "g2rpo_ray.rewards.ocr:check_prompt",
    "geneval": "g2rpo_ray.rewards.geneval_rules:check_prompt",
    "soft_tifa": "g2rpo_ray.rewards.soft_tifa:check_prompt",
    "preservation": "g2rpo_ray.rewards.preservation:check_prompt",
    "preservation_dino": "g2rpo_ray.rewards.preservation:check_prompt",
}
"""By kind: a function that raises ValueError, continuing "the prompt …", for a prompt that cannot be scored."""


def check_reward(key: str, reward: "RewardConfig") -> list[str]:
    """Checks kind, option names and files of a section; returns a line for each file that could not be checked.

    Raises:
        ValueError: one line with the key, the given value and the allowed ones.
    """
    kind, options, gpus = reward.kind, reward.options, reward.resources.get("GPU", 0)
    if kind == PYTHON:
        try:
            build_reward(kind, **options)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from None
        return []
    if kind not in KINDS and ":" not in kind:
        raise ValueError(f"{key}.kind: {kind!r} given; allowed are {', '.join(KINDS)}, or a factory as module:factory")
    if kind not in KINDS:
        return []
    package, remedy = PACKAGES.get(kind, ("", ""))
    if package and not reward.runtime_env and find_spec(package) is None:
        raise ValueError(f"{key}.kind: {kind} needs the package {package}{remedy}")
    if gpus and not has_device(kind):
        raise ValueError(
            f"{key}.resources: GPU: {gpus:g} given or by default, but {kind} runs on the CPU only; give {{CPU: 1}}"
        )
    known = option_defaults(kind)
    for name in options:
        if name == "device" and has_device(kind):
            raise ValueError(
                f"{key}.options.device: given; the device follows {key}.resources: give it there, as GPU: 1 or CPU: 1"
            )
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"{key}.options.{name}: not an option of {kind}; allowed are {allowed}")
    for name, default in known.items():
        if default is REQUIRED and name not in options:
            raise ValueError(f"{key}.options.{name}: missing; {kind} needs it")
    used = {**known, **options}
    checked = (_check_file(f"{key}.options.{name}", name, str(value)) for name, value in used.items())
    return [line for line in checked if line]


def prompt_check(kind: str) -> Callable[[str, Mapping[str, Any]], None]:
    """A function of a prompt and its metadata that raises ValueError if this kind cannot score it."""
    check: Callable[[str, Mapping[str, Any]], None] = _of_kind(PROMPT_CHECKS, kind) or (lambda prompt, metadata: None)
    return check


def max_duration_s(
    config: "RewardConfig", images: int, metadata: Mapping[str, Any], waits: tuple[float, int], group: bool
) -> float:
    """Maximum seconds for the scores of images of one prompt.

    Args:
        config: of the reward.
        images: their number.
        metadata: of the prompt.
        waits: of the reward: see `Reward`.
        group: the reward compares groups.
    """
    seconds, at_once = waits
    questions: Callable[[int, Mapping[str, Any]], int] = _of_kind(QUESTIONS, config.kind) or (
        lambda images, known: images
    )
    size = images if group else min(images, config.batch_size)  # of one call
    return seconds * math.ceil(images / size) * math.ceil(questions(size, metadata) / at_once)


def _of_kind(functions: Mapping[str, str], kind: str) -> Any:
    module_name, _, name = functions.get(kind, "").partition(":")
    return getattr(import_module(module_name), name) if module_name else None


def serving(rewards: "Mapping[str, RewardConfig]") -> dict[str, str]:
    """For each reward, the one whose servers it uses: itself, or an earlier reward that differs only in its part."""
    found: dict[str, str] = {}
    for name, reward in rewards.items():
        same = (
            other
            for other in found.values()
            if reward.kind in PARTS and _without_part(rewards[other]) == _without_part(reward)
        )
        found[name] = next(same, name)
    return found


def _without_part(reward: "RewardConfig") -> "RewardConfig":
    options = {name: given for name, given in reward.options.items() if name != "part"}
    return reward.model_copy(update={"options": options, "weight": 1.0, "win_rate": False})


def option_defaults(kind: str) -> dict[str, Any]:
    """The options of a kind of KINDS with their defaults or REQUIRED, read from the source without importing it."""
    return {name: given for name, given in _parameters(*KINDS[kind].split(":")).items() if name != "device"}


def has_device(kind: str) -> bool:
    """True if a kind of KINDS has an argument `device`."""
    return "device" in _parameters(*KINDS[kind].split(":"))


def _parameters(module_name: str, name: str) -> dict[str, Any]:
    spec = find_spec(module_name)
    assert spec is not None, f"{module_name} is a module of this package"
    assert spec.origin is not None, f"{module_name} has a source file"
    constants: dict[str, Any] = {}
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.Assign):
            with suppress(ValueError):  # not a literal
                constants[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            names = [argument.arg for argument in node.args.args]
            given = [_constant(default, constants) for default in node.args.defaults]
            found = dict(zip(names, [REQUIRED] * (len(names) - len(given)) + given, strict=True))
            if not any(ast.unparse(decorator) == "judged" for decorator in node.decorator_list):
                return found
            found.pop("judge")
            return _parameters("g2rpo_ray.rewards.judge", "open_judge") | found
    raise AssertionError(f"{module_name}:{name} is no function")


def _constant(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    return constants[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)


def _check_file(key: str, name: str, given: str) -> str:
    """A line if `given` is checked only at the start, else "". ValueError if it is neither a file nor a hub name."""
    path = Path(resolve(given))
    if given and name in (*FILE_OPTIONS, *FOLDER_OPTIONS, "architecture") and (fault := path_fault(given)):
        raise ValueError(f"{key}: {shown(given)} given; {fault}")
    if name in SERVER_OPTIONS:
        return f"{key}: {given} is a server, which is contacted at the start"
    if name in FILE_OPTIONS and not path.is_file():
        if is_hub_file(given):
            return f"{key}: {given} is a file on the hub, which is looked up at the start"
        raise ValueError(f"{key}: no file {given}; give a path, or a hub file as repo:file")
    if name in FOLDER_OPTIONS and not path.is_dir():
        if is_hub_id(given):
            return f"{key}: {given} is a hub id, which is looked up at the start"
        raise ValueError(f"{key}: no directory {given}; give one in transformers' format, or a hub id org/name")
    if name == "architecture" and given.endswith(".json") and not path.is_file():
        raise ValueError(f"{key}: no file {given}; give the path of a JSON file")
    return ""
