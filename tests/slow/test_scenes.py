"""The world `scenes`: what its base draws, where a short run begins, and how a build ends."""

import multiprocessing
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from g2rpo_ray.config import load_config
from g2rpo_ray.local import LocalRun
from g2rpo_ray.rewards import build_reward
from g2rpo_ray.world_builder.pipeline import sample
from g2rpo_ray.world_builder.scenes import WORLD
from g2rpo_ray.worlds.scenes.draw import parse, render
from tests.support.runs import finish


def short_run():
    """Scores of the base on held-out prompts, and the metrics of an iteration."""
    run = LocalRun(load_config(WORLD.config, ["data.prompts_per_iteration=2", "evaluation.seeds=1"]))
    return run.heldout().scores, run.step(0)


def test_a_short_run_begins_where_the_base_is():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # DeepSpeed stays in its process
        start, line = pool.submit(short_run).result()
    assert 0.2 < start["correct"].mean() < 0.55
    assert line["reward/preference/std"] > 0
    assert line["learner/ratio_initial_max_dev"] == 0
    assert line["signal/agreement/3"] < 0.99


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_told_to_end_says_so_in_a_line(told, tmp_path):
    command = [sys.executable, "-m", "g2rpo_ray.world_builder.build", "quickstart", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith("autoencoder 0/") for line in process.stdout)
        process.send_signal(told)
        printed = finish(process, 130)
    finally:
        process.kill()
    assert printed.splitlines()[-1] == "stopped: what was under way is not kept"
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def base() -> tuple[np.ndarray, list[str]]:
    """Pictures by the committed pipeline of the held-out prompts, two of each."""
    pipeline = FluxPipeline.from_pretrained(WORLD.root / "pipeline", torch_dtype=torch.float32, local_files_only=True)
    prompts = WORLD.prompts()[1] * 2
    return sample(pipeline, prompts, seed=0), prompts


def test_the_base_draws_some_held_out_prompts_right_and_leaves_room_for_rl(base):
    right = {
        rule: float(build_reward(f"scenes_{rule}").score(*base).mean()) for rule in ("attributes", "count", "correct")
    }
    assert 0.25 < right["correct"] < 0.5
    assert right["attributes"] > right["count"] > right["correct"]  # every picture with a wrong thing has a wrong count


def test_the_preference_model_puts_what_is_nearer_to_the_prompt_first(base):
    settings = load_config(WORLD.config).rewards["preference"]
    preference, (images, prompts) = build_reward(settings.kind, **settings.options), base
    scores, grades = preference.score(images, prompts), WORLD.grade(images, prompts)
    truth = preference.score(render([parse(prompt) for prompt in prompts], np.random.default_rng(0)), prompts)
    assert truth.mean() > scores.mean() + 0.07
    assert np.corrcoef(scores, grades)[0, 1] > 0.65
    other = preference.score(images, prompts[1:] + prompts[:1])
    assert scores.mean() > other.mean() + 0.2
