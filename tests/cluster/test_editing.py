"""Runs on Ray whose prompts have source pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from g2rpo_ray.runs.reader import read_run
from tests.support.runs import lora, metrics, run, same_lora
from tests.support.sources import run_settings
from tests.support.tiny_models import write_tiny


def test_a_run_on_ray_edits_as_one_process_does_and_shows_the_sources(alone: Any, tmp_path: Path) -> None:
    """Sources reach the process that encodes, and the reward's servers, which compare the results with them."""
    given = run_settings(tmp_path, write_tiny("flux2_klein", tmp_path / "klein"))
    given |= {"rewards__preference__kind": "preservation", "data__prompts_per_iteration": 3}
    lines = (tmp_path / "train.jsonl").read_text().splitlines()  # one has no source, which that reward refuses
    (tmp_path / "train.jsonl").write_text("\n".join(line for line in lines if "source" in line))
    whole = alone(**given)
    run(tmp_path, "edits", **given)
    same_lora(lora(tmp_path, "edits"), whole.result().lora)
    found = read_run(str(tmp_path / "edits"))
    assert np.isfinite(found.heldout[2]["preference"]).all()
    assert found.lines[-1]["reward/preference/missing"] == 0
    (source,) = found.sources
    assert source.shape == (16, 24, 3)
    assert Image.open(tmp_path / "edits" / "samples" / "000002.png").width == 3 * 24 * 4
    (prompt,) = json.loads((tmp_path / "edits" / "samples" / "000002.json").read_text())["prompts"]
    assert prompt.startswith("held out [source 96x64 ")


def test_two_ranks_under_zero_3_learn_edits_of_unlike_sizes_as_one_does(alone: Any, tmp_path: Path) -> None:
    """A pass is a collective there: both ranks make as many, of sources of the same sizes."""
    given = run_settings(tmp_path, write_tiny("flux2_klein", tmp_path / "klein"))
    whole = alone(**given)
    run(tmp_path, "ranks", **given, learner__ranks=2, learner__zero_stage=3)
    lines = metrics(tmp_path, "ranks")[1:]  # the first one has the scores of the base
    assert [line["learner/ratio_initial_max_dev"] for line in lines] == [0, 0]
    expected = whole.result()
    assert lines[0]["learner/grad_norm"] == pytest.approx(expected.lines[0]["learner/grad_norm"], rel=1e-4)
    for name, tensor in lora(tmp_path, "ranks").items():
        np.testing.assert_allclose(tensor, expected.lora[name], atol=2e-4, err_msg=name)  # two steps of 1e-3
