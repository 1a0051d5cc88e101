"""Devices and Ray resources of actors."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from g2rpo_ray.config.section import Section


def _accepted_by_ray(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in ("", "memory", "object_store_memory"):
            raise ValueError(f"{name}: cannot be reserved for an actor; give CPU, GPU or a custom resource")
        if round(amount, 4) != amount or (name == "GPU" and amount > 1 and amount % 1):
            raise ValueError(f"{name}: {amount} given; must have at most 4 decimals, and GPU above 1 none")
    return resources


def _one_gpu(resources: dict[str, float]) -> dict[str, float]:
    if resources.get("GPU", 0) > 1:
        raise ValueError(f"GPU: {resources['GPU']:g} given; may be at most 1, because such an actor uses one device")
    return resources


MAX_ACTORS = 4096  # of a pool
Amount = Annotated[float, Field(ge=0, le=1_000_000)]
Resources = Annotated[dict[str, Amount], Field(max_length=32), AfterValidator(_accepted_by_ray)]
OneDevice = Annotated[Resources, AfterValidator(_one_gpu)]


MAX_THREADS = 256


def device_of(resources: Resources) -> str:
    """The GPU that Ray assigns if the resources have one, else the CPU: an actor that reserves no GPU can see all."""
    return "cuda" if resources.get("GPU") else "cpu"


class ActorSection(Section):
    """A section with the Ray resources of one actor, which decide its device and its number of threads."""

    resources: Resources = {"GPU": 1}

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return device_of(self.resources)

    @property
    def threads(self) -> int:
        """CPU threads: a whole number of CPUs, at least 1. On a CPU the last bits of a result can depend on it."""
        return min(MAX_THREADS, max(1, int(self.resources.get("CPU", 1))))


def ray_options(resources: Resources, runtime_env: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Resources and environment as options of a Ray actor or task."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": custom}
    return {**options, "runtime_env": dict(runtime_env)} if runtime_env else options
