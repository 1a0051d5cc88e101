"""Completions by a pool of their own: the bits of one pool, whoever dies, and of one process."""

import re

import pytest

from tests.support.quantised import INT8
from tests.support.runs import actors_of, finish, lora, metrics, run, same_lora, start, wait_for_iteration

APART = {"rollout__completions__max_actors": 2, "rollout__completions__resources": "{CPU: 0}"}


@pytest.mark.core
def test_a_pool_for_completions_that_loses_all_actors_gives_the_bits_of_one_pool(bits, tmp_path):
    process = start(tmp_path, "apart", **APART)
    wait_for_iteration(process, tmp_path, "apart", 1)
    for actor in actors_of(process, "RolloutActor"):
        actor.kill()
    finish(process)
    same_lora(lora(tmp_path, "apart"), bits)
    first = metrics(tmp_path, "apart")[1]
    assert first["completions/actors"] == 2
    assert 0 < first["perf/rollout_utilisation"] < 1
    assert 0 < first["perf/completions_utilisation"] < 1
    assert first["signal/agreement/completions"] == pytest.approx(1)  # the same bits, on the same kind of device
    assert sum(line.get("pool/restarts", 0) for line in metrics(tmp_path, "apart")) == 3
    done = dict(
        re.findall(r"(trunk|branch|exact)/\S+ with .*: done by (\w+)-\d", (tmp_path / "apart" / "run.log").read_text())
    )
    assert done == {"trunk": "rollout", "branch": "completions", "exact": "rollout"}


@pytest.mark.slow
def test_quantised_completions_of_any_number_of_actors_resume_to_the_bits_of_one_process(alone, tmp_path):
    run(tmp_path, "two", iterations=2, **APART, **INT8)
    run(tmp_path, "two", iterations=3, **{**APART, "rollout__completions__max_actors": 1}, **INT8)
    same_lora(lora(tmp_path, "two"), alone(**INT8).result().lora)


@pytest.mark.slow
def test_two_actors_that_compute_all_give_the_bits_of_one_process(alone, tmp_path):
    run(tmp_path, "two", rollout__max_actors=2, **INT8)
    same_lora(lora(tmp_path, "two"), alone(**INT8).result().lora)
    line = metrics(tmp_path, "two")[1]
    assert line["signal/agreement/completions"] > 0.8
    assert {"perf/evaluation_s/completions", "perf/evaluation_s/exact"} <= line.keys()
