"""Downloads models from the hub on each node that needs them, before actors start and their time limits apply."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from g2rpo_ray.actors.pool.failures import first_line, is_death
from g2rpo_ray.actors.pool.limits import Hung, within
from g2rpo_ray.config import Config, Resources
from g2rpo_ray.hub import HubFiles, model_files, reward_files

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0  # between two lines about a long download
FETCH_TIMEOUT_S = 6 * 3600.0  # of one node; the hub client ends a connection without data much earlier

Need = tuple[Sequence[HubFiles], Resources, Mapping[str, Any]]  # files, resources and runtime_env of their actors


async def fetch_models(config: Config, say: Callable[[str], None]) -> None:
    """Download models on each node that has the resources of an actor that loads them.

    A node that dies meanwhile is skipped. Actors on nodes that join later download when they start.

    Raises:
        ValueError: a file cannot be downloaded.
    """
    needs = [need for need in _needs(config) if need[0]]
    if not needs:
        return
    tasks = {}
    for node in ray.nodes():
        for files, resources, environment in needs:
            if node["Alive"] and all(node["Resources"].get(kind, 0) >= amount for kind, amount in resources.items()):
                here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                options = {"runtime_env": dict(environment)} if environment else {}
                tasks[node["NodeID"], *files] = _fetch.options(scheduling_strategy=here, **options).remote(files)
    if not tasks:
        return  # there is no such node yet
    names = ", ".join(dict.fromkeys(one.name for files, *_ in needs for one in files))
    say(f"fetching {names}, where not in the cache, on {len({node for node, *_ in tasks})} nodes")
    started = time.monotonic()
    waiting = asyncio.gather(*(_fetched(task) for task in tasks.values()))
    while not (await asyncio.wait([waiting], timeout=LOG_INTERVAL_S))[0]:
        say(f"still fetching, after {time.monotonic() - started:.0f} s")
    await waiting
    say(f"fetched, after {time.monotonic() - started:.0f} s")


def _needs(config: Config) -> list[Need]:
    rollout, learner, model = config.rollout, config.learner, model_files(config)
    rewards = [
        (reward_files(key, reward), reward.resources, reward.runtime_env)
        for key, reward in config.rewards_by_key.items()
    ]
    apart = [(model, rollout.completions.resources, rollout.runtime_env)] if rollout.completions.apart else []
    return [
        (model, rollout.resources, rollout.runtime_env),
        *apart,
        (model, config.data.encoder_resources, rollout.runtime_env),
        (model, learner.resources, learner.runtime_env),
        *rewards,
    ]


async def _fetched(task: "ray.ObjectRef[None]") -> None:
    try:
        await within(FETCH_TIMEOUT_S, "fetching models", task)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from None
    except (ray.exceptions.RayError, Hung) as error:
        if not is_death(error) and not isinstance(error, Hung):
            raise
        logger.warning("models could not be fetched on a node; its actors will try again: %s", first_line(error))


@ray.remote(num_cpus=0, max_retries=1)
def _fetch(files: Sequence[HubFiles]) -> None:
    for one in files:
        one.fetch()
