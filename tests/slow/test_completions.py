"""Quantised completions on Ray: the bits of one process."""

import pytest

from tests.support.quantised import INT8
from tests.support.runs import lora, metrics, run, same_lora


@pytest.mark.cluster
def test_two_actors_give_the_bits_of_none(alone, tmp_path):
    run(tmp_path, "two", rollout__max_actors=2, **INT8)
    same_lora(lora(tmp_path, "two"), alone(**INT8).result().lora)
    line = metrics(tmp_path, "two")[1]
    assert line["signal/agreement/completions"] > 0.8
    assert {"perf/evaluation_s/completions", "perf/evaluation_s/exact"} <= line.keys()
