"""Finds all problems of a configuration that can be found on this machine, not only the first."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from g2rpo_ray.config import Config
from g2rpo_ray.data import Prompts
from g2rpo_ray.hub import unchecked_files
from g2rpo_ray.messages import one_line
from g2rpo_ray.preflight import (
    check_adapters,
    check_lasting,
    check_model,
    check_network,
    check_packages,
    check_prompts_of,
    check_writable,
    open_run,
    read_unscored_prompts,
)
from g2rpo_ray.rehearsal.devices import Fleet
from g2rpo_ray.rehearsal.published import with_shapes
from g2rpo_ray.rewards import serving
from g2rpo_ray.rewards.pictures import noise
from g2rpo_ray.rewards.trial import trial

T = TypeVar("T")


@dataclass(slots=True)
class Findings:
    """The findings of a rehearsal's checks, as lines."""

    problems: list[str] = field(default_factory=list)
    """Errors that would end the run before it starts, or prevent the start of an actor."""
    unchecked: list[str] = field(default_factory=list)
    """Items that are not on this machine and could not be checked."""
    untried: dict[str, str] = field(default_factory=dict)
    """By key, the reasons why rewards cannot score on this machine."""
    prompts: Prompts | None = None
    shaped: Config | None = None
    """The configuration with the model's configuration files on this machine, if they are known."""

    def attempt(self, check: Callable[[], T]) -> T | None:
        """The result of `check`; None if it raises ValueError, whose text is added to the problems."""
        try:
            return check()
        except ValueError as error:
            self.problems.append(str(error))
            return None


def look(config: Config) -> Findings:
    """Check storage, prompts, packages, model and rewards, each independently of the others."""
    found = Findings()
    found.attempt(lambda: check_lasting(config))
    found.attempt(lambda: check_writable(config, open_run(config)))
    found.attempt(lambda: check_packages(config))
    found.prompts = found.attempt(lambda: read_unscored_prompts(config))
    found.unchecked += found.attempt(lambda: check_model(config)) or []
    found.shaped = shaped = with_shapes(config)
    if shaped is not None:
        found.attempt(lambda: check_network(shaped))
        if config.lora.initial:
            found.attempt(lambda: check_adapters(shaped, None, model_is_here=True))
    for key in config.rewards_by_key:
        _look_at_reward(config, key, found)
    return found


def look_at_memory(config: Config, found: Findings, fleet: Fleet) -> list[str]:
    """Lines about the memory of each kind of actor at full size; adds a problem if the device has less."""
    from g2rpo_ray.models.estimate import LIBRARIES
    from g2rpo_ray.rehearsal.full_size import full_size

    shaped, lines = found.shaped, []
    sizes = None if shaped is None else found.attempt(lambda: full_size(shaped))
    for actor, parts in {**(sizes or {}), **servers_memory(config, found)}.items():
        total = (sum(parts.values()) + LIBRARIES) / 1e9
        listed = ", ".join(f"{part} {size / 1e9:.3g}" for part, size in parts.items())
        lines.append(f"{actor}: {total:.3g} GB: {listed}, libraries {LIBRARIES / 1e9:.3g}")
        if fleet.device.gigabytes and total > fleet.device.gigabytes:
            found.problems.append(
                f"a {actor} needs {total:.3g} GB, but a {fleet.kind} has {fleet.device.gigabytes:g}; `--check` prints "
                "the largest micro-batches"
            )
    return lines


def servers_memory(config: Config, found: Findings) -> dict[str, dict[str, int]]:
    """Bytes on its device of each reward server with a GPU, whose model is on this machine: of its `weights`, and the
    peak of `scoring` a batch of images of noise."""
    sizes: dict[str, dict[str, int]] = {}
    first = serving(config.all_rewards)
    for key, reward in config.rewards_by_key.items():
        name = key.partition(".")[2]
        if reward.device != "cuda" or first[name] != name or key in found.untried or found.prompts is None:
            continue
        pictures = noise(config.model, found.prompts, reward.batch_size)
        try:
            with trial({key: reward}, pictures, config.startup_timeout_s, sized=True) as tried:
                sizes[f"server of {key}"] = tried()[key]
        except ValueError as error:  # such as a user's own that reads its tensors: no problem of the run
            found.unchecked.append(f"memory of {one_line(error)}")
    return sizes


def _look_at_reward(config: Config, key: str, found: Findings) -> None:
    reward, records = config.rewards_by_key[key], found.prompts.records if found.prompts else {}
    wrong = len(found.problems)
    absent = found.attempt(lambda: unchecked_files(key, reward)) or []
    found.unchecked += absent
    found.attempt(lambda: check_prompts_of(key, reward, records))
    reasons = [*found.problems[wrong:], *absent]
    if reasons:
        found.untried[key] = reasons[0].removeprefix(f"{key}.").removeprefix(f"{key}: ")
    elif reward.runtime_env:
        found.untried[key] = "it has a runtime_env"
