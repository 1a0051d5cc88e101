"""Changing a run while it goes on: the sizes of its pools, asked for from another process."""

import asyncio
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import RayActorError

from actors.pool import Pool

NAMESPACE = "g2rpo_ray"


@ray.remote(num_cpus=0)
class Control:
    """Where a run's requests wait for it. An async actor: `next` waits while `ask` comes in."""

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = dict(sizes)
        self._asked: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    async def ask(self, pool: str, size: int) -> dict[str, int]:
        """Ask for a pool of another size; the sizes asked for by now. An unknown pool changes nothing."""
        if pool in self._sizes:
            self._sizes[pool] = size
            await self._asked.put((pool, size))
        return self._sizes

    async def next(self) -> tuple[str, int]:
        return await self._asked.get()


def control_name(run: str) -> str:
    return f"control/{run}"


async def follow_requests(run: str, pools: Mapping[str, Pool], say: Callable[[str], None]) -> None:
    """Resize the pools as asked, for as long as the run goes on; a control actor that died is replaced."""
    while True:
        sizes = {name: pool.size for name, pool in pools.items()}
        options = {"name": control_name(run), "namespace": NAMESPACE}
        control = Control.options(**options).remote(sizes)  # type: ignore[attr-defined]
        try:
            while True:
                name, size = await control.next.remote()
                say(f"{name}: {pools[name].size} actors were asked for, now {size}")
                pools[name].resize(size)
        except RayActorError:
            continue
        finally:
            ray.kill(control)
