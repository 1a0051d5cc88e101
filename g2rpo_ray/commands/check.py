"""`--check`, beyond the checks of every start: plan, shapes of the model, a score of each reward, resources."""

import os
from collections.abc import Sequence

import numpy as np

from g2rpo_ray.commands.plan import describe_plan
from g2rpo_ray.config import Config, RewardConfig
from g2rpo_ray.data import Prompts
from g2rpo_ray.numerics import cuda_fault
from g2rpo_ray.preflight import check_network
from g2rpo_ray.rehearsal.devices import Fleet
from g2rpo_ray.rehearsal.hours import describe_calibrated, describe_hours
from g2rpo_ray.rehearsal.published import with_shapes
from g2rpo_ray.rehearsal.times import Times


def check(
    config: Config,
    prompts: Prompts,
    unchecked: Sequence[str],
    address: str | None,
    fleet: Fleet | None = None,
    times: Times | None = None,
) -> None:
    """Prints the plan, unchecked items, and whether the cluster or this machine has enough resources.

    Args:
        unchecked: a line for each item that earlier checks could not check.
        address: the Ray cluster; None: no cluster is started, and this machine is checked.
        fleet: devices for which hours are estimated; then resources are not checked.
        times: measurements of `g2rpo bench` to estimate hours from; then resources are not checked.

    Raises:
        ValueError: one line; the run cannot work.
    """
    from g2rpo_ray.actors.cluster import named_address
    from g2rpo_ray.rewards.pictures import noise
    from g2rpo_ray.rewards.trial import trial

    private, unchecked = named_address(address)[1] is None, list(unchecked)
    pictures = noise(config.model, prompts, 2)
    with trial(_local_rewards(config, unchecked), pictures, config.startup_timeout_s) as tried:
        if shaped := with_shapes(config):
            check_network(shaped)
        print(describe_plan(config))
        if times:
            print(describe_calibrated(config, len(prompts.heldout), fleet, times))
        elif fleet:
            print(_hours(config, shaped, len(prompts.heldout), fleet))
        elif private and config.rollout.device == "cpu":
            _check_memory(config)
        found = tried()
    right: list[str] = []
    for key, result in found.items():
        if "untried" in result:
            unchecked.append(f"{key}: not tried, {result['untried']}")
        elif not np.isfinite(result["scores"]).all():
            unchecked.append(f"{key}: no score for an image of noise and the prompt {prompts.train[0]!r}")
        else:
            right.append(key.partition(".")[2])
    if right:
        print(f"rewards:       {', '.join(right)} scored two images of noise")
    for line in unchecked:
        print(f"not checked:   {line}")
    if not fleet and not times:
        _check_place(config, address, private)


def _check_place(config: Config, address: str | None, private: bool) -> None:
    """Prints that this machine, or the cluster, has enough resources. ValueError, in one line, if it has not."""
    from g2rpo_ray.actors.cluster import check_resources, cluster, this_machine

    if private:
        machine = this_machine()
        room = check_resources(config, machine)
        if machine["GPU"] and (fault := cuda_fault()):
            raise ValueError(f"CUDA does not work on this machine: {fault}")
        has = ", ".join(f"{amount:g} {name}" for name, amount in machine.items())
        print(f"cluster:       none given; this machine, with {has}, {room}")
        return
    with cluster(address):
        from g2rpo_ray.actors.pool.cuda import check_cuda  # imports Ray, which must not happen before a cluster exists

        room = check_resources(config)
        for line in check_cuda(config):
            print(f"not checked:   {line}")
    print(f"cluster:       it {room}")


def _hours(config: Config, shaped: Config | None, heldout: int, fleet: Fleet) -> str:
    if shaped is None:
        raise ValueError(
            f"--devices: the shapes of {config.model.path} are unknown; give a folder with the model's files"
        )
    return describe_hours(shaped, heldout, fleet)


def _check_memory(config: Config) -> None:
    """Raises ValueError, in one line, if a rollout actor on this machine's CPU needs more memory than it has."""
    if not config.model.is_local:
        return
    from g2rpo_ray.models.estimate import rollout_memory

    needed = sum(rollout_memory(config).values()) / 2**30
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > there:
        raise ValueError(
            f"rollout.micro_batch: {config.rollout.micro_batch} given; an actor needs {needed:.0f} GiB for images of "
            f"{config.model.width} × {config.model.height}, this machine has {there:.0f} GiB; lower it, "
            "rollout.decode_batch, or the size of the images"
        )


def _local_rewards(config: Config, unchecked: Sequence[str]) -> dict[str, RewardConfig]:
    """The rewards, by key, whose files are all on this machine."""
    rewards = config.rewards_by_key.items()
    return {key: reward for key, reward in rewards if not any(line.startswith(f"{key}.") for line in unchecked)}
