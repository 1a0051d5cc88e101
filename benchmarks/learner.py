"""An update of the learner: seconds and peak memory by ZeRO stage and number of ranks, over gloo; no Ray.

tests/isolated python benchmarks/learner.py
tests/isolated python benchmarks/learner.py --set method=dance_grpo     the chains of another method; any has its name
"""

import os
import resource
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from common import Row, median, parser, report

import torch  # isort: skip  # common makes the packages importable
import torch.multiprocessing as multiprocessing

from g2rpo_ray.config import Config, load_config


class Found(NamedTuple):
    """What one case told."""

    seconds: list[float]  # of each update
    megabytes: float  # peak of the process
    states: int  # of all prompts
    steps: int  # of the optimizer, an update


def rollouts(config: Config) -> list[Any]:
    """Prompts as the sampler would hand them over: their trees, grown as far as the learner looks, with random scores.

    The paths to the images, most of a rollout's cost, are left out.
    """
    from g2rpo_ray.models import FlowModel

    model = FlowModel.load(config.model, "cpu", transformer=True)
    return [prompt_rollout(config, model, slot) for slot in range(config.data.prompts_per_iteration)]


@torch.no_grad()
def prompt_rollout(config: Config, model: Any, slot: int) -> Any:
    from g2rpo_ray.algo.growth import grow
    from g2rpo_ray.rollout.noise import generator
    from g2rpo_ray.rollout.plan import edge_key, prompt_tree
    from g2rpo_ray.rollout.sigmas import sigma_grid
    from g2rpo_ray.types import Branches, PromptRollout, Trunk, TrunkUnit

    unit, draw = TrunkUnit(0, slot, str(slot)), np.random.default_rng(slot)
    embedding = model.random_embedding(unit.prompt, torch.Generator().manual_seed(slot))
    conditioning = model.condition([embedding])
    tree, roots = prompt_tree(config, 0, slot, unit.prompt), range(config.sampler.roots)
    points = tree.branch_points.tolist()
    ends = {*tree.source[tree.trained].tolist(), *tree.target[tree.trained].tolist()}
    touched = sorted(ends.union(points))
    nodes = set(touched)
    for node in reversed(range(len(tree.index))):  # a parent's number is below its children's
        if node in nodes and tree.parent[node] >= 0:
            nodes.add(int(tree.parent[node]))
    part = sorted(nodes)

    def noise(edges: Sequence[int]) -> torch.Tensor:
        return torch.stack([model.initial_noise(generator(*edge_key(config, unit, tree, edge))) for edge in edges])

    grown = grow(
        lambda x, sigma: model.velocity(x, sigma, conditioning), tree, part, roots,
        torch.stack([model.initial_noise(generator("root", slot, root)) for root in roots]),
        sigma_grid(config.sampler, model), kernel=config.sampler.kernel, eta=config.sampler.eta,
        noise=noise, keep=touched, micro_batch=config.rollout.micro_batch,
    )  # fmt: skip
    latents, of_trunk = grown.latents.numpy(), np.isin(touched, points)
    trunk = Trunk(latents[of_trunk], grown.velocities.numpy()[of_trunk])
    edges = tree.edge[part][tree.edge[part] >= 0]
    below = Branches(np.array(touched)[~of_trunk], latents[~of_trunk], edges, grown.log_prob.numpy())
    scores = draw.standard_normal((len(config.rewards), len(tree.leaf)), dtype=np.float32)
    return PromptRollout(0, slot, unit.prompt, tree, scores, embedding, trunk, (below,))


def one_rank(rank: int, config: Config, port: int, repeats: int, answers: Any) -> None:
    """Process of one rank; rank 0 answers with a `Found`."""
    ranks = config.learner.ranks
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    from g2rpo_ray.learner.batch import BatchShape, spread
    from g2rpo_ray.learner.engine import LearnerEngine

    prompts = rollouts(config)
    shards = spread(prompts, ranks)
    shape = BatchShape.of(shards, config.learner)
    engine = LearnerEngine(config, rank, ranks)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        engine.update(shards[rank], shape)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        states, memory = sum(len(prompt.tree.states) for prompt in prompts), resource.getrusage(resource.RUSAGE_SELF)
        answers.put(Found(seconds[1:], memory.ru_maxrss / 1024, states, len(shape.steps)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo may still run, and aborts an interpreter that ends in order


def measure(config: Config, repeats: int) -> Found:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    arguments = (config, port, repeats, answers)
    multiprocessing.spawn(one_rank, arguments, nprocs=config.learner.ranks)
    found: Found = answers.get()
    return found


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a setting")
    given = options.parse_args()
    cases, repeats = [(stage, ranks) for ranks in (1, 2) for stage in (1, 2, 3)], given.repeats
    prompts = given.prompts
    if given.quick:
        cases, repeats, prompts = [(2, 1)], 1, 4
    found: dict[tuple[int, int], list[Found]] = {case: [] for case in cases}
    for _ in range(1 if given.quick else 2):  # A B A B: the whole list twice
        for stage, ranks in cases:
            settings = [f"learner.zero_stage={stage}", f"learner.ranks={ranks}", "learner.velocity_tolerance=1"]
            config = load_config(None, [*settings, f"data.prompts_per_iteration={prompts}", *given.set])
            found[stage, ranks].append(measure(config, repeats))
    rows: list[Row] = []
    for (stage, ranks), runs in found.items():
        seconds, states = median([second for run in runs for second in run.seconds]), runs[0].states
        row: Row = {"ZeRO": stage, "ranks": ranks, "states": states, "s an update": seconds}
        row["states/s"] = states / seconds
        rows.append(row | {"peak MB a rank (process)": max(run.megabytes for run in runs)})
    steps = next(iter(found.values()))[0].steps
    note = f"{config.method}, {prompts} prompts, optimizer steps an update: {steps}, 1 thread a rank, gloo."
    report("Learner, embedded model on the CPU", rows, given.json, [note])


if __name__ == "__main__":
    main()
