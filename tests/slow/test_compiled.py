"""Compiled blocks (rollout.compile, learner.compile): graphs for kinds of blocks, not for blocks or weights.

The backend is torch's "eager", which runs a graph's own operations: the compiler that would follow is not ours.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from g2rpo_ray.config import load_config
from g2rpo_ray.local import LocalRun
from g2rpo_ray.paths import resolve
from tests.support.runs import dotted

SETTINGS = {
    "method": "diffusion_nft", "sampler.steps": 2, "sampler.roots": 4, "learner.kl_beta": 0.1, "learner.lr": 1e-3,
    "learner.updates_per_rollout": 2, "learner.draws": 1, "learner.micro_batch": 2, "rollout.micro_batch": 2,
    "learner.gradient_checkpointing": "true", "sampler.branch_steps": "[0]", "sampler.group_size": 1,
}  # fmt: skip

"""Passes with and without gradient, with another policy in place of the LoRA, and without any."""


def write_pipeline(folder: Path, blocks: int) -> Path:
    """The embedded pipeline with so many blocks of either kind."""
    pipeline = FluxPipeline.from_pretrained(resolve("embedded:pipeline"))
    shape = dict(pipeline.transformer.config) | {"num_layers": blocks, "num_single_layers": blocks}
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel.from_config(shape)
    pipeline.save_pretrained(folder)
    return folder


def trained(paths: list[Path], compiled: bool) -> list[tuple[list[int], dict[str, Any]]]:
    """Of a run for each pipeline, in one process: graphs so far after each iteration, and the LoRA."""
    from torch._dynamo.testing import CompileCounter

    torch.set_num_threads(1)
    counter, found = CompileCounter(), []
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=counter)  # type: ignore[method-assign]
    for path in paths:
        given = dotted({}) | SETTINGS | {"model.path": path}
        given |= {f"{part}.compile": compiled for part in ("rollout", "learner")}
        run, graphs = LocalRun(load_config(None, [f"{key}={value}" for key, value in given.items()])), []
        for iteration in range(3):
            run.step(iteration)
            graphs.append(counter.frame_count)
        found.append((graphs, run.engine.lora_state()))
    return found


def test_graphs_do_not_depend_on_blocks_or_weights_and_a_graph_s_operations_are_the_same(tmp_path: Path) -> None:
    paths = [write_pipeline(tmp_path / str(blocks), blocks) for blocks in (3, 12)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        (few, lora), (many, _) = pool.submit(trained, paths, True).result()
        ((none, expected),) = pool.submit(trained, paths[:1], False).result()
    assert none == [0, 0, 0]
    assert 0 < few[0] <= few[1] == few[2], "new weights were compiled again"
    assert many == [few[2]] * 3, "other blocks were compiled again"
    for name, array in expected.items():
        assert (lora[name] == array).all(), name
