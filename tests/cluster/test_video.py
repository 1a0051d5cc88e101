"""Runs on Ray of a model of videos."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from g2rpo_ray.runs.reader import read_run
from tests.support.pipelines import run_settings
from tests.support.runs import lora, run, same_lora

FRAMES, HEIGHT, WIDTH = 5, 16, 32
GIVEN = {
    "model__frames": FRAMES, "model__height": HEIGHT, "model__width": WIDTH, "learner__edge_weight": "time",
    "rewards__preference__frames": "[0, -1]", "eval_rewards__motion": "{kind: dynamic_degree, resources: {CPU: 1}}",
}  # fmt: skip


def test_a_run_of_videos_has_the_bits_of_one_process_and_shows_what_moves(alone: Any, tmp_path: Path) -> None:
    """One iteration with one rollout actor, and from its checkpoint another one with two."""
    given = run_settings("wan", tmp_path) | GIVEN
    whole = alone(**given)
    run(tmp_path, "videos", **given | {"iterations": 1})
    told = run(tmp_path, "videos", **given, rollout__max_actors=2)
    assert "| 0/2 [" not in told  # where it would begin anew
    assert "| 1/2 [" in told
    same_lora(lora(tmp_path, "videos"), whole.result().lora)
    found = read_run(str(tmp_path / "videos"))
    assert np.isfinite(found.heldout[2]["motion"]).all()
    (picture,) = found.evaluations[2].pictures
    assert picture.shape == (HEIGHT, FRAMES * WIDTH, 3)
    assert Image.open(tmp_path / "videos" / "samples" / "000002.webp").n_frames == FRAMES
    assert "data:image/webp" in (tmp_path / "videos" / "report.html").read_text()
