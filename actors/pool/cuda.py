"""Checks that torch can use the GPUs that Ray counts by NVML, which a driver too old for this CUDA also answers."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from g2rpo_ray.config import Config
from g2rpo_ray.numerics import cuda_fault

CHECK_TIMEOUT_S = 120.0  # of a process that imports torch on a busy node


def check_cuda(config: Config) -> list[str]:
    """Try CUDA on each node with GPUs; returns a line for each node that did not answer.

    Raises:
        ValueError: CUDA fails on a node.
    """
    if not uses_cuda(config):
        return []
    unchecked, asked = [], {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("GPU"):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            # it reserves no GPU: Ray then hides none, and it does not wait for busy ones
            asked[node["NodeManagerAddress"]] = _try_cuda.options(scheduling_strategy=here).remote()
    for address, answer in asked.items():
        try:
            fault = ray.get(answer, timeout=CHECK_TIMEOUT_S)
        except GetTimeoutError:
            unchecked.append(f"CUDA on {address}: no answer within {CHECK_TIMEOUT_S:.0f} s")
            continue
        if fault:
            raise ValueError(f"CUDA does not work on {address}: {fault}")
    return unchecked


def uses_cuda(config: Config) -> bool:
    """Whether any actor of a run computes on a GPU."""
    rewards = [reward.device for reward in config.all_rewards.values()]
    apart = [config.rollout.completions.device] if config.rollout.completions.apart else []
    return "cuda" in (config.rollout.device, config.learner.device, config.data.encoder_device, *rewards, *apart)


@ray.remote(num_cpus=0, max_retries=0)
def _try_cuda() -> Any:
    return cuda_fault()
