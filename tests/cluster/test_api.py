"""The Python API on Ray: in a notebook, in a thread, with parts of one's own."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.own_parts import (
    PROMPTS,
    own,  # noqa: F401  fixtures
)
from tests.support.runs import SMALL

TWICE = """
import asyncio, json, sys, threading
from g2rpo_ray import LocalRun, load_config, train

small, prompts, output = json.loads(sys.argv[1])
config, lines = load_config(None, small, output=output), []

def trained(name, **more):
    rewards = {"brightness": lambda images, prompts: list(images.mean((1, 2, 3)) / 255)}
    named = config.model_copy(update={"name": name})
    return train(named, rewards=rewards, prompts=prompts, heldout=["a red star"], **more)

async def notebook():
    return trained("first", callbacks=[lambda done, metrics: lines.append((done, metrics["timing_s/step"] > 0))])

runs = [asyncio.run(notebook())]
thread = threading.Thread(target=lambda: runs.append(trained("second")))
thread.start()
thread.join()
first, second = runs
assert lines == [(0, True), (1, True), (2, True)], lines
means = [[line.get("reward/brightness/mean") for line in run.metrics[1:]] for run in runs]
assert means[0] == means[1] and 0 < means[0][0] < 1, means
assert first.heldout[2]["brightness"].shape == (1, 1) and sorted(first.heldout) == [0, 2]
local = LocalRun(config, rewards={"brightness": lambda images, prompts: images.mean((1, 2, 3)) / 255},
                 prompts=prompts, heldout=["a red star"])
assert local.heldout().scores["brightness"] == first.heldout[0]["brightness"]
assert [local.step(iteration)["reward/brightness/mean"] for iteration in range(2)] == means[0]
assert local.heldout().scores["brightness"] == first.heldout[2]["brightness"]
finished = trained("first")
assert finished.done == 2
print(first.lora)
try:
    train(config, rewards={"other": max}, prompts=["one"])
except ValueError as error:
    print(error)
"""


def test_runs_in_a_notebook_and_a_thread_of_one_process(tmp_path):
    """With a function as reward and a list of prompts; the result is that of the same run again, and is loaded."""
    small = {**SMALL, "iterations": 2, "data.embeddings": tmp_path / "embeddings"}
    settings = [f"{key}={value}" for key, value in small.items() if not key.startswith("rewards.")]
    given = json.dumps([settings, PROMPTS, str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", TWICE, given], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, lora, refused = done.stdout.splitlines()
    assert lora == f"{tmp_path}/first/lora"
    assert refused.startswith("data.prompts_per_iteration: 2 given")
    assert "train(config, rewards={...})" in (tmp_path / "first" / "config.yaml").read_text()


ADDED = """
import json, sys
import numpy as np
from g2rpo_ray import LocalRun, load_config

small, settings, mine = json.loads(sys.argv[1])
bits = []
for own in ({}, mine):
    run = LocalRun(load_config(None, small, **{**settings, **own}))
    for iteration in range(2):
        assert run.step(iteration)["learner/grad_norm"] > 0
    bits.append(run.engine.lora_state())
assert all(np.array_equal(bits[0][name], bits[1][name]) for name in {**bits[0], **bits[1]})
print(run.engine._model.__class__.__module__)
"""


@pytest.mark.core
@pytest.mark.slow
def test_a_run_with_ones_own_kernel_objective_group_and_family(own, tmp_path):
    """Which compute what those of the package do: the same bits."""
    small = [f"{key}={value}" for key, value in SMALL.items()]
    like = {"sampler.kernel": "dance", "learner.clip_range": 1e-4, "lora.targets": ["attn.to_q"]}
    mine = {"sampler.kernel": "mine:kernel", "learner.objective": "mine:objective", "credit.group": "mine:group",
            "model.family": "mine:Family"}  # fmt: skip
    given = json.dumps([small, like, mine])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", ADDED, given],
        capture_output=True, text=True, timeout=300, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "mine"
