"""Whole runs of model families: the same bits with two actors and none."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from g2rpo_ray.config import LoraConfig, load_config
from g2rpo_ray.models import (
    add_lora,
    export_lora,
)
from g2rpo_ray.rollout.plan import possible_trees
from tests.support.pipelines import load, random_state, run_settings, settings
from tests.support.runs import head_command, kill_all, listens, lora, metrics, run, same_lora, wait_for

PORT = 6395  # of the cluster that the whole runs share


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """One cluster for all runs: each would start its own otherwise."""
    options = ("--num-cpus=4", "--include-dashboard=false", "--object-store-memory=200000000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of the head, and of the runs that come to it
        command = head_command(PORT, *options)
        head = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for(head, lambda: listens(PORT))
            yield f"127.0.0.1:{PORT}"
        finally:
            kill_all(head)


@pytest.mark.cluster
@pytest.mark.parametrize("family", ["sd3"])  # with guidance; qwen_image below, and the quickstart, are packed
def test_a_whole_run_has_the_same_bits_with_two_actors_and_none(
    family: str, address: str, alone: Any, tmp_path: Path
) -> None:
    """On Ray and DeepSpeed, and in one process; prompts of unlike length meet in the learner's batches."""
    config, given = settings(family), run_settings(family, tmp_path)
    whole = alone(**given)
    run(tmp_path, "two", "--address", address, rollout__min_actors=2, rollout__max_actors=2, **given)
    (tree,) = possible_trees(load_config(str(tmp_path / "two" / "config.yaml")))
    cost = 1 if config.negative_prompt is None else 2
    for lines in (metrics(tmp_path, "two")[1:], whole.result().lines):
        assert all(line["learner/ratio_initial_max_dev"] == 0 for line in lines)
        assert [line["rollout/evaluations"] for line in lines] == [cost * 2 * tree.evaluations] * 2
    adapter = lora(tmp_path, "two")
    same_lora(adapter, whole.result().lora)
    assert any(np.abs(array).max() > 0 for name, array in adapter.items() if "lora_B" in name)


@pytest.mark.cluster
@pytest.mark.parametrize("family", ["qwen_image"])
def test_a_run_goes_on_from_an_adapter_that_evaluate_judges_alike(family: str, address: str, tmp_path: Path) -> None:
    """`lora.initial` before its first step, and `evaluate` on its file: the same images, so the same score."""
    model, adapter = load(family), LoraConfig(rank=4)
    add_lora(model.transformer, adapter, seed=0)
    export_lora(tmp_path / "adapter", random_state(model), adapter, model.pipeline_class)
    dotted = run_settings(family, tmp_path) | {
        "iterations": 1,
        "lora__initial": tmp_path / "adapter",
        "lora__alpha": adapter.alpha,
    }
    run(tmp_path, "from", "--address", address, **dotted)
    arguments = ["--config", tmp_path / "from" / "config.yaml", "--adapter", f"new={tmp_path / 'adapter'}"]
    judged = subprocess.run(
        [sys.executable, "-m", "g2rpo_ray.evaluate", *map(str, arguments), "--address", address, "--seeds", "1",
         "--output", str(tmp_path / "judged"), "--set", "lora.initial=null"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not judged.returncode, judged.stdout + judged.stderr
    base, new = json.loads((tmp_path / "judged" / "table.json").read_text())["rows"]
    assert (base["adapter"], new["adapter"]) == ("base", "new")
    assert base["mean"] != new["mean"] == metrics(tmp_path, "from")[0]["heldout/preference/mean"]
