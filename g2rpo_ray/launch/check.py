"""What `--check` does beyond the checks of every start: the plan, the model's shapes, a score of each reward."""

import os
from pathlib import Path

from g2rpo_ray.config import Config, RewardConfig
from g2rpo_ray.data import Prompts
from g2rpo_ray.files import resolve
from g2rpo_ray.launch.plan import describe_plan


def check(config: Config, prompts: Prompts, unchecked: list[str], address: str | None) -> None:
    """Print the plan, what could not be checked, and whether the cluster, or this machine, has what the run needs.

    Args:
        unchecked: what the checks before could not look at, a line each.
        address: the Ray cluster; None: a private one is not started, the machine is looked at.

    Raises:
        ValueError: one line; the run cannot work.
    """
    from actors.cluster import check_resources, cluster, this_machine
    from g2rpo_ray.rewards.trial import trial

    private = not (address or os.environ.get("RAY_ADDRESS"))
    rewards, size = _at_hand(config, unchecked), (config.model.height, config.model.width)
    prompt = prompts.train[0]
    with trial(rewards, size, prompt, prompts.metadata.get(prompt, {}), config.startup_timeout_s) as tried:
        if Path(resolve(config.model.path)).is_dir():
            _check_network(config)
        print(describe_plan(config))
        if private and config.rollout.device == "cpu":
            _check_memory(config)
        unchecked = [*unchecked, *tried()]
    for line in unchecked:
        print(f"not checked:   {line}")
    if private:
        machine = this_machine()
        check_resources(config, machine)
        has = ", ".join(f"{amount:g} {name}" for name, amount in machine.items())
        print(f"cluster:       none was asked; this machine, with {has}, has what the run needs")
        return
    with cluster(address):
        check_resources(config)
    print("cluster:       it has what the run needs")


def _check_network(config: Config) -> None:
    """Raise ValueError, in one line, for a size, a LoRA or an attention backend that the model cannot have."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    from g2rpo_ray.models import lora_shapes

    lora_shapes(config.model, config.lora)
    backends = [backend.value for backend in AttentionBackendName]
    if config.model.attention_backend not in (None, *backends):
        raise ValueError(
            f"model.attention_backend: {config.model.attention_backend!r} given; allowed are {', '.join(backends)}"
        )


def _check_memory(config: Config) -> None:
    """Raise ValueError, in one line, if a rollout actor on this machine's CPU needs more memory than there is."""
    if not Path(resolve(config.model.path)).is_dir():
        return
    from g2rpo_ray.models.estimate import rollout_memory

    needed = sum(rollout_memory(config).values()) / 2**30
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > there:
        raise ValueError(
            f"rollout.micro_batch: {config.rollout.micro_batch} given; an actor needs {needed:.0f} GiB for pictures of "
            f"{config.model.width} × {config.model.height}, this machine has {there:.0f} GiB: lower it, "
            "rollout.decode_batch, or the size of the pictures"
        )


def _at_hand(config: Config, unchecked: list[str]) -> dict[str, RewardConfig]:
    """The rewards, by key, whose files are all on this machine."""
    rewards = {
        f"{section}.{name}": reward
        for section in ("rewards", "eval_rewards")
        for name, reward in getattr(config, section).items()
    }
    return {key: r for key, r in rewards.items() if not any(line.startswith(f"{key}.") for line in unchecked)}
