"""Every method through the command line: the same bits with any number of actors and after a kill; docs that say so."""

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.data import iteration_prompts
from g2rpo_ray.launch.preflight import read_run_prompts
from g2rpo_ray.methods import method_names
from g2rpo_ray.rollout.plan import prompt_tree
from g2rpo_ray.study.single import Single
from tests.runs import (
    EMBEDDINGS,
    finish,
    kill_all,
    kill_at_work,
    lora,
    metrics,
    run,
    same_lora,
    start,
    wait_for_iteration,
)

SMALL = {
    "flow_grpo": {"roots": 3, "group_size": 1, "branch_steps": "[0]"},
    "mix_grpo": {"group_size": 3, "branch_steps": "[0]", "slide_every": 1},
    "branch_grpo": {"group_size": 2, "branch_steps": "[0]"},
    "diffusion_nft": {"roots": 3, "group_size": 1, "branch_steps": "[0]"},
    "awm": {"roots": 3, "group_size": 1, "branch_steps": "[0]"},
}
EVALUATIONS = {  # of the two prompts of each of two iterations, by hand: 5 steps
    "flow_grpo": [2 * 3 * 5] * 2,
    "mix_grpo": [2 * (1 + 3 * 4), 2 * (2 + 3 * 3)],  # the window has slid: a longer trunk, shorter chains
    "branch_grpo": [2 * (1 + 2 * (1 + 2 + 4 + 4))] * 2,  # splits at 1 and 2 of 5
    "diffusion_nft": [2 * 3 * 5] * 2,
    "awm": [2 * 3 * 5] * 2,
}
ROOT = Path(__file__).parent.parent


def settings_of(method: str) -> dict[str, object]:
    """Of a run of two iterations, in units of one child each."""
    settings = {f"sampler__{key}": value for key, value in SMALL[method].items()}
    return settings | {
        "method": method, "iterations": 2, "learner__updates_per_rollout": 2, "rollout__members_per_unit": 1
    }  # fmt: skip


@pytest.mark.cluster
@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method == "flow_grpo" else pytest.mark.slow) for method in SMALL]
)
def test_two_actors_one_of_them_killed_give_the_bits_of_none(method, alone, tmp_path):
    settings = settings_of(method)
    whole, process = alone(**settings), start(tmp_path, "two", rollout__max_actors=2, **settings)
    wait_for_iteration(process, tmp_path, "two", 1)
    kill_at_work(process, "RolloutActor.compute")
    finish(process)
    lines = metrics(tmp_path, "two")[1:]
    assert [line["rollout/evaluations"] for line in whole.result().lines] == EVALUATIONS[method]
    if method == "diffusion_nft":  # it has no ratio
        assert all(line["actor/old_shift"] > 0 and "actor/ratio_max_dev" not in line for line in lines)
    else:
        assert all(line["actor/ratio_initial_max_dev"] <= 1e-6 for line in lines)
        assert any(line["actor/ratio_max_dev"] > 1e-6 for line in lines)  # the second update of an iteration leaves 1
    assert sum(line["rollout/restarts"] for line in lines) == 1
    same_lora(lora(tmp_path, "two"), whole.result().lora)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow_grpo", "mix_grpo", "branch_grpo"])
def test_one_actor_gives_the_bits_of_none(method, alone, tmp_path):
    """As do two: so one and two give the same. Of g2rpo: `test_two_actors_one_and_none_give_the_same_bits`."""
    whole = alone(**settings_of(method))
    run(tmp_path, "one", **settings_of(method))
    same_lora(lora(tmp_path, "one"), whole.result().lora)


@pytest.mark.cluster
@pytest.mark.slow
def test_averages_of_the_policy_survive_a_dead_driver_and_are_judged_and_exported(tmp_path):
    """With stale rollouts, whose old policy is the average before: all of these copies are in the checkpoint."""
    settings = {f"sampler__{key}": value for key, value in SMALL["diffusion_nft"].items()}
    settings |= {"method": "diffusion_nft", "rollout__max_staleness": 1, "learner__ema": 0.9, "learner__lr": 1e-3}
    settings["learner__old_decay"] = "[0, 0.2, 0.5]"
    whole, cut = (start(tmp_path, name, **settings) for name in ("whole", "cut"))
    wait_for_iteration(cut, tmp_path, "cut", 1)
    kill_all(cut)
    finish(whole)
    told = run(tmp_path, "cut", **settings)
    for kind in ("lora", "lora_ema"):
        same_lora(lora(tmp_path, "cut", kind), lora(tmp_path, "whole", kind))
    trained, averaged = lora(tmp_path, "whole"), lora(tmp_path, "whole", "lora_ema")
    assert any(not np.array_equal(trained[name], averaged[name]) for name in trained)
    last = metrics(tmp_path, "whole")[-1]
    assert last["rollout/weights_version"] == 1  # of 3 iterations: sampled while the second was learned from
    means = {kind: [last[f"{kind}/{name}/mean"] for name in ("preference",)] for kind in ("heldout", "heldout_ema")}
    assert means["heldout"] != means["heldout_ema"]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["heldout_ema"]["preference"]["after"] == pytest.approx(means["heldout_ema"][0])
    assert "Its average (lora_ema/)" in told


@pytest.fixture(scope="module")
def worker():
    """A process that has loaded its libraries once: DeepSpeed stays in it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def iterate(config):
    run = Single(config)
    return run.iterate(0), run.sampler.evaluations


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_each_method_runs_on_the_quickstart_by_its_name_alone(method, worker):
    """An iteration of four prompts at the preset's own size: evaluations as planned, and a ratio that begins at 1."""
    settings = ["iterations=1", "data.prompts_per_iteration=4", f"data.embeddings={EMBEDDINGS.name}"]
    config = load_config(None, [f"method={method}", *settings])
    line, evaluations = worker.submit(iterate, config).result()
    prompts = iteration_prompts(read_run_prompts(config).train, 4, config.seed, 0)
    trees = [prompt_tree(config, 0, slot, prompt) for slot, prompt in enumerate(prompts)]
    assert evaluations == sum(tree.evaluations for tree in trees)
    assert line.get("actor/ratio_initial_max_dev", 0.0) <= 1e-6
    assert line["actor/grad_norm"] > 0
    steps = {f"signal/spread/{step}" for tree in trees for step in tree.start[tree.trained]}
    assert {key for key in line if key.startswith("signal/spread/")} >= steps


def test_a_method_s_tables_in_the_docs_are_what_the_plan_says():
    done = subprocess.run([sys.executable, "docs/methods.py", "--tables"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "methods.md").read_text()
    for table in done.stdout.strip().split("\n\n"):
        assert table in text


def test_every_method_has_a_picture_drawn_from_its_plan(tmp_path):
    done = subprocess.run([sys.executable, "docs/methods.py", "--output", tmp_path], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "methods.md").read_text()
    for method in method_names():
        assert f"methods/{method}.svg" in text
        drawn, kept = ((folder / f"{method}.svg").read_text() for folder in (tmp_path, ROOT / "docs" / "methods"))
        assert drawn.count("<use") == kept.count("<use") > 0  # as many nodes, whatever matplotlib makes of a line
