"""Scaling of rollout: the real pool and collector over Ray, with devices that wait a unit's cost instead of computing.

    tests/isolated python benchmarks/scaling.py
    python benchmarks/scaling.py --model      only the simulation, to 1,000 devices: no Ray

The devices are coroutines in a few Ray actors (`--hosts`), so that 64 of them fit on two cores. Real is every call
through Ray, every object, the pool's dispatch, the collector's planning and the run's log; not real is one process a
device.
"""

import asyncio
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, median, parser, report

from g2rpo_ray.config import Config, load_config, with_settings  # isort: skip  # common makes the packages importable
from g2rpo_ray.actors.pool.order import PREFETCH_S
from g2rpo_ray.rehearsal.simulation import simulate
from g2rpo_ray.rehearsal.times import Times
from g2rpo_ray.rollout.plan import Part, branch_part, branch_units, prompt_tree, trunk_part
from g2rpo_ray.runs.tracking import log_to
from g2rpo_ray.types import Branches, BranchUnit, Place, Trunk, TrunkUnit, UnitReport, WeightsManifest

PAPER = ["steps=16", "branch_steps=[0, 1, 2, 3, 4, 5, 6, 7]", "strides=[1, 2, 3]", "group_size=12", "layout=paper"]
SIZES = (12, 6, 3, 1)  # members a unit


class Work:
    """What the units of a prompt take. All prompts have the same tree."""

    def __init__(self, config: Config):
        tree, trunk = prompt_tree(config, 0, 0, ""), TrunkUnit(0, 0, "")
        self.trunk = trunk_part(tree)
        units = branch_units(config, tree, trunk)
        self.branches = {(unit.branch_step, unit.first_member): branch_part(tree, unit) for unit in units}
        self.evaluations = tree.evaluations

    @property
    def costs(self) -> list[int]:
        """Evaluations of each branch unit of a prompt."""
        return [part.evaluations for part in self.branches.values()]

    def part(self, unit: TrunkUnit | BranchUnit) -> Part:
        return self.trunk if isinstance(unit, TrunkUnit) else self.branches[unit.branch_step, unit.first_member]


def paper(members: int) -> Config:
    """The paper's setting, with so many members a unit."""
    return load_config(None, [*(f"sampler.{setting}" for setting in PAPER), f"rollout.members_per_unit={members}"])


def on_paper(members: int, prompts: int, actors: int) -> float:
    """Utilisation by the simulation of the product."""
    settings = {"data.prompts_per_iteration": prompts, "rollout.max_actors": actors}
    found = simulate(with_settings(paper(members), settings), Times({1: 1.0}, {1: 0.0}, {1: 0.0}))
    return found.work_s / (actors * (found.rollout_s - PREFETCH_S))  # until the last image is there


class _Scores:
    """A reward whose servers are never the bound."""

    takes_groups = False

    async def score(self, images: list[Any], count: int, prompt: str, what: str) -> np.ndarray:
        return np.zeros(count, np.float32)


class _Embeddings:
    def __init__(self, ref: Any):
        self._ref = ref

    async def refs(self, prompts: list[str]) -> list[Any]:
        return [self._ref] * len(prompts)


class _Device:
    """An `Actor`: one of the devices of a host, `times` as slow as others."""

    def __init__(self, host: Any, name: str, times: float):
        self._host, self._name, self._times = host, name, times

    def call(self, method: str, *args: Any) -> list[Any]:
        if method == "compute":
            return self._host.compute.remote(self._name, self._times, *args)
        return [self._host.ready.remote()]

    def end(self) -> None:
        """It ends with its host."""


def _host(work: Work, seconds: float) -> Any:
    import ray

    place = Place(1, "", "")

    class Host:
        def __init__(self) -> None:
            self._busy: dict[str, asyncio.Lock] = {}

        async def ready(self) -> Place:
            return place

        @ray.method(num_returns=3)
        async def compute(
            self, name: str, times: float, unit: Any, weights: Any, embedding: Any, trunk: Any = None
        ) -> Any:
            part = work.part(unit)
            taken = part.evaluations * seconds * times
            async with self._busy.setdefault(name, asyncio.Lock()):  # one unit at a time, as a device does
                await asyncio.sleep(taken)
            images = np.zeros((len(part.images), 8, 8, 3), np.uint8)
            told = UnitReport(
                unit.name, name, place, time.time() - taken, weights.manifest.version, part.evaluations, len(images),
                taken, 0.0,
            )  # fmt: skip
            x = np.zeros((1, 1, 1), np.float32)
            if isinstance(unit, TrunkUnit):
                return Trunk(x, x), images, told
            return Branches(np.zeros(1, np.int64), x, np.array(part.edges), np.zeros(1, np.float32)), images, told

    return ray.remote(max_concurrency=1000, num_cpus=0)(Host).remote()


def measure(actors: int, prompts: int, members: int, seconds: float, hosts: int, repeats: int, slow: float) -> Row:
    """Iterations on simulated devices that take `seconds` an evaluation, the first of them `slow` times as long."""
    import ray

    from g2rpo_ray.actors.collector import Collector
    from g2rpo_ray.actors.pool.dispatch import Pool
    from g2rpo_ray.actors.workers.keeper import Keeper
    from g2rpo_ray.actors.workers.weights import PublishedWeights

    config = paper(members)
    work = Work(config)
    machines = [_host(work, seconds) for _ in range(hosts)]
    round_robin = itertools.cycle(machines)
    weights = PublishedWeights(WeightsManifest(1, 0, 0, ""), ray.put({}))
    names = [f"prompt {number}" for number in range(prompts)]
    taken, cpu, loop, copies = [], [], [], []

    def spawn(name: str) -> Any:
        return _Device(next(round_robin), name, slow if name == "rollout-0" else 1)

    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            pool = Pool("rollout", spawn, actors, minimum=actors, copies=True)
            scores: Any = {name: _Scores() for name in config.all_rewards}
            embeddings: Any = _Embeddings(ray.put(np.zeros(8)))
            keeper = Keeper(ray.get_runtime_context().get_node_id(), 600)
            collector = Collector(config, embeddings, pool, pool, scores, keeper.keep, [])
            pool.start(group)
            await pool.actors.wait_ready()
            for iteration in range(repeats + 1):
                process, thread = time.process_time(), time.thread_time()
                rollout = await collector.rollout(iteration, names, weights)
                cpu.append((time.process_time() - process) / len(rollout.reports))
                loop.append((time.thread_time() - thread) / len(rollout.reports))
                taken.append(rollout.sampling_seconds)
                copies.append(pool.copied.take())
            keeper.stop()
            pool.stop()

    asyncio.run(run())
    for machine in machines:
        ray.kill(machine)
    iteration = median(taken[1:])  # the first one warms up
    ideal = prompts * work.evaluations * seconds / (actors - 1 + 1 / slow)
    return {
        "devices": actors, "prompts": prompts, "members a unit": members,
        "units": prompts * (1 + len(work.branches)),
        "ideal s": ideal, "iteration s": iteration,
        "utilisation": ideal / iteration, "on paper": on_paper(members, prompts, actors), "copies": median(copies[1:]),
        "driver loop ms a unit": 1e3 * median(loop[1:]), "driver process CPU ms a unit": 1e3 * median(cpu[1:]),
    }  # fmt: skip


def model_rows(quick: bool) -> list[Row]:
    of_3, rows = Work(paper(3)), list[Row]()
    # the longest chain that no number of devices shortens: a trunk, then one unit of the dearest branch step
    chain = of_3.trunk.evaluations + max(of_3.costs)
    cases = [(64, 16), (64, 64), (128, 16), (256, 64), (1000, 16), (1000, 64), (1000, 256), (1000, 1024)]
    for actors, prompts in cases[:3] if quick else cases:
        row: Row = {"devices": actors, "prompts": prompts}
        row |= {f"{members} a unit": on_paper(members, prompts, actors) for members in SIZES}
        row["most devices kept busy, units of 3"] = prompts * of_3.evaluations // chain
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__ or "", repeats=3)
    options.add_argument("--model", action="store_true", help="only the simulation")
    options.add_argument(
        "--evaluation-ms", type=float, default=4.0, help="what a simulated evaluation takes (FLUX: 100)"
    )
    options.add_argument("--hosts", type=int, default=2, help="Ray actors that the devices live in")
    options.add_argument("--slow", type=float, default=1.0, help="as slow as this many times the others: one device")
    options.add_argument("--cases", nargs="+", metavar="DEVICESxPROMPTS", default=["1x1", "8x8", "64x16", "64x64"])
    options.add_argument("--members", type=int, nargs="+", default=[12, 6, 3], help="of a unit")
    given = options.parse_args()
    if not given.model:
        import ray

        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False
        )
        cases = [tuple(map(int, case.split("x"))) for case in given.cases]
        sizes, repeats = given.members, given.repeats
        if given.quick:
            cases, sizes, repeats = [(8, 2)], [12], 1
        seconds = given.evaluation_ms / 1e3
        with tempfile.TemporaryDirectory() as folder:
            close = log_to(Path(folder) / "run.log")  # a line a unit, as in a run
            rows = [measure(*case, size, seconds, given.hosts, repeats, given.slow) for case in cases for size in sizes]
            close()
        note = (
            f"{given.evaluation_ms:g} ms an evaluation, {given.hosts} host processes, median of {repeats} iterations."
        )
        report("Scaling, simulated devices over Ray", rows, given.json, [note])
        ray.shutdown()
    else:
        report("Scaling, simulated: utilisation", model_rows(given.quick), given.json)


if __name__ == "__main__":
    main()
