"""Building a world: where a short run begins, and how a build ends."""

import multiprocessing
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.local import LocalRun
from g2rpo_ray.world_builder.scenes import WORLD
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
