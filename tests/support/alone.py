"""Runs in one process without Ray: the bits that a run must have on any number of actors, whatever happens to it."""

import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from g2rpo_ray.config import load_config
from g2rpo_ray.local import LocalRun
from g2rpo_ray.models import FlowModel, export_lora
from tests.support.runs import dotted, tensors


@dataclass(frozen=True)
class Alone:
    """What a run in one process ends with: the tensors of its adapter's file, and the metrics of each iteration."""

    lora: Mapping[str, np.ndarray]
    lines: list[dict[str, Any]]


@contextmanager
def one_process() -> Iterator[Callable[..., Future[Alone]]]:
    """A function that does a small run, its settings with __ for a dot, in a process that loads its libraries once.

    That is not the tests' own: DeepSpeed stays in it.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        @functools.cache
        def submit(*overrides: str) -> Future[Alone]:
            return pool.submit(train, overrides)

        yield lambda **settings: submit(*(f"{key}={value}" for key, value in dotted(settings).items()))


def train(overrides: tuple[str, ...]) -> Alone:
    """All iterations."""
    config = load_config(None, overrides)
    run, lines = LocalRun(config), []
    for iteration in range(config.iterations):
        before = run.sampler.evaluations
        line = run.step(iteration)
        lines.append({**line, "rollout/evaluations": run.sampler.evaluations - before})
    with tempfile.TemporaryDirectory() as folder:
        export_lora(folder, run.engine.lora_state(), config.lora, FlowModel.load(config.model, "cpu").pipeline_class)
        return Alone(tensors(Path(folder)), lines)
