"""A run that is resumed with something else: it is told, and what was there is kept."""

import json
import shutil
import signal

import pytest

from g2rpo_ray.record.lease import LEASE
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.record.tracking import read_lines
from g2rpo_ray.run import main
from tests.runs import PREFERENCE, command, finish, lora, metrics, run, same_lora, start, wait_for, wait_for_iteration

pytestmark = pytest.mark.cluster


@pytest.fixture
def done(reference, tmp_path):
    """A run of three iterations, finished, to do with what one likes."""
    shutil.copytree(reference[0] / "reference", tmp_path / "run")
    return tmp_path / "run"


def refused(capsys, done, *arguments, **settings):
    settings = {"rollout__max_actors": 2, **PREFERENCE, **settings}
    assert main(command(done.parent, done.name, *arguments, **settings)[3:]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


@pytest.mark.slow
def test_other_settings_are_refused_by_name(done, capsys):
    before = {path: path.stat().st_mtime for path in done.rglob("*")}
    printed = refused(capsys, done, seed=1, learner__lr=0.5, iterations=9)
    assert "not the settings of " in printed
    assert "seed 0 -> 1, learner.lr " in printed
    assert "-> 0.5; --resume changed" in printed
    assert "iterations: 2 given, but 3 are done" in refused(capsys, done, iterations=2)
    assert {path: path.stat().st_mtime for path in done.rglob("*")} == before


@pytest.mark.slow
def test_going_back_with_other_settings_and_back_again(reference, done):
    """From iteration 1 at another learning rate and by other judges; killed, and again; then the old lineage again."""
    back = ("--resume", str(done / "checkpoints" / "000001"), "changed")
    other = {"learner__lr": 0.02, "rewards": "{colour: {kind: jpeg_compressibility, resources: {CPU: 0.1}}}"}
    process = start(done.parent, "run", *back, **other)
    wait_for(process, (done / "changes.jsonl").exists)
    wait_for_iteration(process, done.parent, "run", 2)
    process.send_signal(signal.SIGTERM)
    printed = finish(process, status=130)
    assert "since iteration 1: " in printed
    assert "learner.lr " in printed
    printed = run(done.parent, "run", *back, **other)
    assert "before: after 1 iterations" in printed
    assert [line["iteration"] for line in metrics(done.parent, "run")] == [0, 1, 2, 3]
    (line,) = read_lines(done / "changes.jsonl")
    assert (line["iteration"], line["judged_alike"], line["set_aside"]) == (1, False, "set_aside/1")
    summary = json.loads((done / "summary.json").read_text())
    assert (summary["heldout_since"], list(summary["heldout"])) == (1, ["colour"])
    aside = done / "set_aside" / "1"
    kept = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file()]
    original = reference[0] / "reference"
    assert all((original / path).read_bytes() == (aside / path).read_bytes() for path in kept)
    assert {path.name for path in aside.iterdir()} == {path.name for path in original.iterdir()} - {"embeddings"}
    run(done.parent, "run", "--resume", str(aside / "checkpoints" / "000001"), **PREFERENCE)
    same_lora(lora(done.parent, "run"), lora(reference[0], "reference"))
    assert not [path for path in (done / "set_aside" / "2").iterdir() if path.name == LEASE]


@pytest.mark.slow
def test_a_run_that_was_taken_over_ends_in_one_line(tmp_path):
    process = start(tmp_path, "taken", iterations=100)
    wait_for_iteration(process, tmp_path, "taken", 1)
    second = start(tmp_path, "taken", iterations=100)
    assert f"is in use by process {process.pid} on " in finish(second, status=2)
    run_folder = Folder(tmp_path / "taken")
    run_folder.write(LEASE, json.dumps({"token": "x", "pid": 7, "host": "other", "since": "now"}).encode())
    printed = finish(process, status=1)
    assert "taken was taken over by process 7 on other, since now" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert not run_folder.exists("error.log")
    assert json.loads(run_folder.read(LEASE))["pid"] == 7
