"""Runs that are resumed with other settings or from an earlier checkpoint: a directory holds one run."""

import json
import shutil

import pytest

from g2rpo_ray.commands.train import main
from g2rpo_ray.runs.lease import LEASE
from g2rpo_ray.runs.storage import Folder
from tests.support.runs import PREFERENCE, command, finish, lora, metrics, run, same_lora, start, wait_for_iteration

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


def test_other_settings_are_refused_by_name(done, capsys):
    before = {path: path.stat().st_mtime for path in done.rglob("*")}
    printed = refused(capsys, done, seed=1, learner__lr=0.5, iterations=9)
    assert "has other settings: seed 0 -> 1, learner.lr " in printed
    assert "-> 0.5; choose another --name, and add --resume " in printed
    assert "iterations: 2 given, but 3 are " in refused(capsys, done, iterations=2)
    assert "choose another --name" in refused(capsys, done, "--resume", str(done / "checkpoints" / "000001"))
    assert "choose another --name" in refused(capsys, done, "--resume", "never")
    assert {path: path.stat().st_mtime for path in done.rglob("*")} == before


def test_an_earlier_checkpoint_starts_a_run_of_another_name(reference, done, capsys):
    """By other judges, and not again if it has its own; and with the same settings, which gives the same bits."""
    back, out = ("--resume", str(done / "checkpoints" / "000001")), done.parent
    other = {"learner__lr": 0.02, "rewards": "{colour: {kind: jpeg_compressibility, resources: {CPU: 0.1}}}"}
    printed = run(out, "other", *back, **other)
    assert f"resumed from {back[1]} with other settings: " in printed
    assert "before: after 1 iterations" in printed
    assert main(command(out, "other", *back, **other)[3:]) == 0
    assert "other is finished" in capsys.readouterr().out
    assert [line["iteration"] for line in metrics(out, "other")] == [1, 2, 3]
    summary = json.loads((out / "other" / "summary.json").read_text())
    assert (summary["resumed_from"]["iteration"], list(summary["heldout"])) == (1, ["colour"])
    run(out, "same", *back, **PREFERENCE)
    same_lora(lora(out, "same"), lora(reference[0], "reference"))
    for path in (reference[0] / "reference").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (done / path.relative_to(reference[0] / "reference")).read_bytes()


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
