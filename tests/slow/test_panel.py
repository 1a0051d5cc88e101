"""A run on Ray that the hacking panel ends."""

import json

import pytest

from tests.support import runs


@pytest.mark.cluster
def test_a_run_whose_lora_goes_astray_is_ended(tmp_path):
    told = runs.run(
        tmp_path, "astray", iterations=4, learner__lr=1, evaluation__every=1, evaluation__stop_on="[distance]"
    )
    assert "WARNING: hacking panel: distance" in told
    assert "the hacking panel (distance) ends the run after 1 iterations; lora/ is of the last iteration" in told
    assert [line["iteration"] for line in runs.metrics(tmp_path, "astray")] == [0, 1]
    assert json.loads((tmp_path / "astray" / "summary.json").read_text())["stopped_by"] == ["distance"]
    assert "ended by the hacking panel" in (tmp_path / "astray" / "report.html").read_text()
    again = runs.run(
        tmp_path, "astray", iterations=4, learner__lr=1, evaluation__every=1, evaluation__stop_on="[distance]"
    )
    assert "astray is finished" in again
