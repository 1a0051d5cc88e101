"""What an actor runs on, and what of the cluster it asks for."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

Device = Literal["cpu", "cuda"]


def _ray_takes(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in ("", "memory", "object_store_memory"):
            raise ValueError(f"{name}: not a resource that is asked for here; give CPU, GPU or one of your own")
        if round(amount, 4) != amount or (name == "GPU" and amount > 1 and amount % 1):
            raise ValueError(f"{name}: {amount} given; must have at most 4 decimals, and GPU above 1 none")
    return resources


Amount = Annotated[float, Field(ge=0, le=1_000_000)]
Resources = Annotated[dict[str, Amount], Field(max_length=32), AfterValidator(_ray_takes)]


def ray_options(resources: Resources) -> dict[str, Any]:
    """Resources as options of a Ray actor or task, where CPU and GPU have names of their own."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": custom}
