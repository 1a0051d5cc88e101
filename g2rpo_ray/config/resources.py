"""Devices and Ray resources of actors."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError


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


def _assigned(device: str, info: ValidationInfo) -> str:
    """Resolves `auto` by the resources of the same section. An actor that reserves no GPU can see all GPUs."""
    key = str(info.field_name).replace("device", "resources")
    if key not in info.data:  # invalid, and refused for that
        return device
    gpus = info.data[key].get("GPU", 0)
    if device == "cuda" and not gpus:
        reason = f"{key} has no GPU, so all such actors would share GPU 0; add GPU: 1 to {key}, or give auto"
        raise PydanticCustomError("device", "{reason}", {"reason": reason})
    if device == "cpu" and gpus:
        reason = f"{key} reserves GPU: {gpus:g}, which would idle; remove GPU from {key}, or give auto"
        raise PydanticCustomError("device", "{reason}", {"reason": reason})
    return "cuda" if gpus else "cpu"


Device = Annotated[Literal["auto", "cpu", "cuda"], AfterValidator(_assigned)]
"""Declare it after the resources of its section, with `validate_default=True`. Validation replaces `auto`."""


def ray_options(resources: Resources, runtime_env: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Resources and environment as options of a Ray actor or task."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": custom}
    return {**options, "runtime_env": dict(runtime_env)} if runtime_env else options
