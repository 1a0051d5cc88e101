"""Evaluations on Ray: what they leave, and the same after a kill."""

import json
import signal
import subprocess
import sys

import psutil
import pytest
from PIL import Image

from g2rpo_ray.commands.evaluate import main
from g2rpo_ray.runs.tracking import read_lines
from tests.support.evaluations import files  # noqa: F401  fixtures
from tests.support.runs import EMBEDDINGS, descendants, finish, wait_for


def arguments(files, output):
    adapter, prompts = f"new={files / 'lora'}", str(files / "prompts.txt")
    return ["--adapter", adapter, "--prompts", prompts, "--grid", "1", "--steps", "30", "60", "--seeds", "8",
            "--output", str(output), "--set", f"data.embeddings={EMBEDDINGS.name}"]  # fmt: skip


def start(files, output, *settings):
    command = [sys.executable, "-m", "g2rpo_ray.evaluate", *arguments(files, output), *settings]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def by_cell(output):
    lines = read_lines(output / "scores.jsonl")
    cells = {(line["key"], line["steps"], line["prompt"]): line["scores"] for line in lines}
    assert len(cells) == len(lines)  # nothing twice
    return cells


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """An evaluation that nothing disturbs: its folder and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    return output, finish(start(files, output, "--set", "rollout.max_actors=1"))


@pytest.mark.core
def test_an_evaluation_leaves_what_the_documentation_promises(files, whole):
    output, printed = whole
    assert "| base | " in printed
    assert "| new | preference | " in printed
    rows = json.loads((output / "table.json").read_text())["rows"]
    assert [(r["steps"], r["adapter"], r["reward"]) for r in rows] == [
        (steps, adapter, reward)
        for steps in (30, 60)
        for adapter in ("base", "new")
        for reward in ("preference", "colour", "shape")
    ]
    assert all(r["scores"] == 16 and r["missing"] == 0 for r in rows)
    assert all(r["pairs"] == (0 if r["adapter"] == "base" else 16) for r in rows)
    assert (output / "table.md").read_text().strip() in printed
    assert Image.open(output / "grid-30.png").size == (2 * 96, 14 + 96 + 14)
    assert main([*arguments(files, output)]) == 0  # all is there: no cluster is started


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_interrupted_then_finished_is_as_if_never_stopped(files, whole, tmp_path):
    """With another number of actors, and with half a line, as a killed evaluation leaves it."""
    interrupted = start(files, tmp_path)
    wait_for(interrupted, lambda: len(read_lines(tmp_path / "scores.jsonl")) >= 1)
    children = descendants(interrupted)
    interrupted.send_signal(signal.SIGINT)
    printed = finish(interrupted, status=130)
    assert "of 8 units are scored and saved. Run the same command to resume" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]
    first = by_cell(tmp_path)
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"key": "')

    finish(start(files, tmp_path))
    scores = by_cell(tmp_path)
    assert len(first) < len(scores) == 2 * 2 * 2  # policies, steps, prompts
    assert first.items() <= scores.items()
    assert by_cell(whole[0]) == scores
    assert (whole[0] / "table.csv").read_text() == (tmp_path / "table.csv").read_text()
