"""An update of the learner: seconds and peak memory by ZeRO stage and number of ranks, over gloo; no Ray.

tests/isolated python benchmarks/learner.py
"""

import os
import resource
import socket
import time
from typing import Any

import numpy as np
from common import Row, median, parser, report

import torch  # isort: skip  # common makes the packages importable
import torch.multiprocessing as multiprocessing

from g2rpo_ray.config import Config, load_config


def rollouts(config: Config) -> list[Any]:
    """Prompts as the sampler would hand them over, from noise in place of an anchor: the learner's work is the same."""
    from g2rpo_ray.algo import transition
    from g2rpo_ray.models import FluxModel
    from g2rpo_ray.rollout.noise import generator
    from g2rpo_ray.rollout.plan import sigma_grid
    from g2rpo_ray.types import Anchor, Branches, PromptEmbedding, PromptRollout

    model = FluxModel.load(config.model, "cpu", transformer=True)
    sampler, sigmas = config.sampler, sigma_grid(config.sampler, model.image_tokens)
    draw, network = np.random.default_rng(0), model.transformer.config
    made = []
    for slot in range(config.data.prompts_per_iteration):
        pooled = draw.standard_normal(network.pooled_projection_dim, dtype=np.float32)
        text = (config.model.max_sequence_length, network.joint_attention_dim)
        embedding = PromptEmbedding(str(slot), pooled, draw.standard_normal(text, dtype=np.float32), "float32")
        latents = torch.stack([model.initial_noise(generator("x", slot, step)) for step in sampler.branch_steps])
        branches = []
        with torch.no_grad():
            velocities = model.velocity(latents, sigmas[list(sampler.branch_steps)], model.condition([embedding]))
        for place, step in enumerate(sampler.branch_steps):
            noise = torch.stack([model.initial_noise(generator("n", slot, step, g)) for g in range(sampler.group_size)])
            x, v = latents[place][None], velocities[place][None]
            after = transition(sampler.kernel, x, v, sigmas, step, sampler.eta, noise=noise)
            assert after.log_prob is not None
            branches.append((Branches(after.next_x.numpy(), after.log_prob.numpy()),))
        shape = (len(config.rewards), len(sampler.branch_steps), len(sampler.strides), sampler.group_size)
        rewards = draw.standard_normal(shape, dtype=np.float32)
        anchor = Anchor(latents.numpy(), velocities.numpy())
        made.append(PromptRollout(slot, str(slot), rewards, embedding, anchor, tuple(branches)))
    return made


def one_rank(rank: int, config: Config, port: int, repeats: int, answers: Any) -> None:
    """Process of one rank; rank 0 answers with (seconds of each update, peak of its memory in MB)."""
    ranks = config.learner.ranks
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    from learner.batch import BatchShape, spread
    from learner.engine import LearnerEngine

    prompts = rollouts(config)
    shard, shape = spread(prompts, ranks)[rank], BatchShape.of(prompts)
    engine = LearnerEngine(config, rank, ranks)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        engine.update(shard, shape)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        answers.put((seconds[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo may still run, and aborts an interpreter that ends in order


def measure(config: Config, repeats: int) -> tuple[list[float], float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    arguments = (config, port, repeats, answers)
    multiprocessing.spawn(one_rank, arguments, nprocs=config.learner.ranks)  # type: ignore[no-untyped-call]
    seconds, memory = answers.get()
    return seconds, memory


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a setting")
    given = options.parse_args()
    cases, repeats = [(stage, ranks) for ranks in (1, 2) for stage in (1, 2, 3)], given.repeats
    prompts = given.prompts
    if given.quick:
        cases, repeats, prompts = [(2, 1)], 1, 2
    found: dict[tuple[int, int], list[tuple[list[float], float]]] = {case: [] for case in cases}
    for _ in range(1 if given.quick else 2):  # A B A B: the whole list twice
        for stage, ranks in cases:
            settings = [f"learner.zero_stage={stage}", f"learner.ranks={ranks}", "learner.ratio_tolerance=1"]
            config = load_config(None, [*settings, f"data.prompts_per_iteration={prompts}", *given.set])
            found[stage, ranks].append(measure(config, repeats))
    rows: list[Row] = []
    for (stage, ranks), runs in found.items():
        seconds = median([second for times, _ in runs for second in times])
        states = prompts * len(config.sampler.branch_steps)
        row: Row = {"ZeRO": stage, "ranks": ranks, "s an update": seconds, "branch states/s": states / seconds}
        rows.append(row | {"peak MB a rank (process)": max(memory for _, memory in runs)})
    note = f"{prompts} prompts, {len(config.sampler.branch_steps)} optimizer steps an update, 1 thread a rank, gloo."
    report("Learner, embedded model on the CPU", rows, given.json, [note])


if __name__ == "__main__":
    main()
