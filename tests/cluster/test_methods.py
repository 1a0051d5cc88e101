"""Methods on Ray: the same bits with two actors and none, averages that survive a dead driver."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.data import iteration_prompts
from g2rpo_ray.local import LocalRun
from g2rpo_ray.methods import method_names
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.rollout.plan import prompt_tree
from tests.support.method_runs import SMALL, settings_of
from tests.support.runs import (
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


@pytest.mark.parametrize("method", ["flow_grpo", pytest.param("diffusion_nft", marks=pytest.mark.slow)])
def test_two_actors_one_of_them_killed_give_the_bits_of_none(method, alone, tmp_path):
    settings = settings_of(method)
    whole, process = alone(**settings), start(tmp_path, "two", rollout__max_actors=2, **settings)
    wait_for_iteration(process, tmp_path, "two", 1)
    kill_at_work(process, "RolloutActor.compute")
    finish(process)
    lines = metrics(tmp_path, "two")[1:]
    if method == "diffusion_nft":  # it has no ratio
        assert all(line["learner/old_shift"] > 0 and "learner/ratio_max_dev" not in line for line in lines)
    else:
        assert all(line["learner/ratio_initial_max_dev"] == 0 for line in lines)
        assert any(line["learner/ratio_max_dev"] > 1e-6 for line in lines)  # the second update of an iteration leaves 1
    assert sum(line["pool/restarts"] for line in lines) == 1
    same_lora(lora(tmp_path, "two"), whole.result().lora)


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
    """The metrics of all iterations, and their evaluations."""
    run = LocalRun(config)
    return [run.step(iteration) for iteration in range(config.iterations)], run.sampler.evaluations


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_each_method_runs_on_the_quickstart_by_its_name_alone(method, worker):
    """In bfloat16, at the preset's own size: evaluations as planned, and ratios that begin at exactly 1."""
    count = load_config(None, [f"method={method}"]).learner.updates_per_rollout  # each needs a prompt
    iterations = 2 if method in ("g2rpo", "diffusion_nft") else 1  # from the second on the LoRA has moved
    size = [f"iterations={iterations}", f"data.prompts_per_iteration={count}", "model.dtype=bfloat16"]
    config = load_config(None, [f"method={method}", f"data.embeddings={EMBEDDINGS.name}", *size])
    lines, evaluations = worker.submit(iterate, config).result()
    train, trees = read_run_prompts(config).train, []
    for iteration in range(iterations):
        prompts = iteration_prompts(train, count, config.seed, iteration)
        trees += [prompt_tree(config, iteration, slot, prompt) for slot, prompt in enumerate(prompts)]
    assert evaluations == sum(tree.evaluations for tree in trees)
    for line in lines:
        assert line.get("learner/ratio_initial_max_dev", 0.0) == 0
        assert line["mismatch/velocity"] == 0  # on one device, with a LoRA that has moved, too
        assert line["learner/grad_norm"] > 0
    steps = {f"signal/spread/{step}" for tree in trees for step in tree.start[tree.trained]}
    assert {key for line in lines for key in line if key.startswith("signal/spread/")} >= steps
