"""Studies that are killed, interrupted, or run on Ray."""

import multiprocessing
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from g2rpo_ray.commands.study import main
from g2rpo_ray.runs.lease import Lease
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.runs.tracking import read_lines, to_json
from g2rpo_ray.study.plan import Plan
from g2rpo_ray.study.record import FILE
from g2rpo_ray.study.rows import Results
from g2rpo_ray.study.runner import workers
from g2rpo_ray.study.schema import read_study
from tests.support.runs import actors_of, fill, kill_all, small_disk, wait_for
from tests.support.studies import STOPPED, STUDY, TREE, command, plan_of, study_file


def done(file: Path, output: Path, *more: str) -> str:
    ended = subprocess.run(command(file, output, *more), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_study_that_is_killed_goes_on_and_its_tables_come_from_the_record_alone(tmp_path):
    file, out = study_file(tmp_path, set={**STUDY["set"], "output": str(tmp_path / "runs")}), tmp_path / "out"
    process = subprocess.Popen(command(file, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while len(read_lines(out / FILE)) < 4:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its worker ends itself
    kept = read_lines(out / FILE)
    cut = kept.pop()
    (out / FILE).write_text("".join(to_json(line) + "\n" for line in kept) + to_json(cut)[:90])
    done(file, out)
    lines = {line["key"]: line for line in read_lines(out / FILE)}
    assert list(lines)[: len(kept)] == [line["key"] for line in kept]
    assert len(lines) == 1 + 2 + 4  # the base, a grid of two, two variants on two seeds; the ablation has the same
    for part in ("adapter", "scores", "evaluations", "states"):
        assert lines[cut["key"]][part] == cut[part]  # the same bits again
    plan = Plan(*read_study(str(file)))
    for variant in ("tree", "chains"):
        lr, _ = Results(plan, lines).rate("one", variant)
        for case in plan.runs("one", variant, lr):
            line = lines[case.key]
            assert line["curve"][-1]["cost"] == line["evaluations"] + line["updates"] <= 120
            assert line["updates"] >= 3 * line["states"]
            assert line["curve"][-1]["iteration"] == case.config.iterations
            assert line["mismatch_velocity"] <= 1e-5
            assert len(line["scores"]["preference"]) == 12
    assert (out / "one-pictures.png").is_file()
    shutil.copy(out / FILE, (tmp_path / "elsewhere").mkdir() or tmp_path / "elsewhere" / FILE)
    done(file, tmp_path / "elsewhere", "--table")
    for name in ("table.md", "table.csv", "table.json", "one-preference.svg"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (out / name).read_bytes()


def test_a_full_disk_ends_the_study_in_a_line_and_costs_no_run_that_is_done(tmp_path):
    with small_disk(tmp_path, "1m") as disk:
        small = {"one": {"title": "Small", "seeds": [0, 1], "variants": {"tree": TREE | {"learner": {"lr": 1e-3}}}}}
        settings = {**STUDY["set"], "output": str(tmp_path / "runs")}
        file = study_file(tmp_path, set=settings, tuning=None, tables=small)
        process = subprocess.Popen(command(file, disk), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(process, lambda: len(read_lines(disk / FILE)) >= 2)
        fill(disk / "filler")
        _, told = process.communicate(timeout=240)
        assert process.returncode == 1, told
        assert re.match(
            r"error: .*No space left on device.*; the same command resumes from the record", told.splitlines()[-1]
        )
        assert "Traceback" not in told
        kept = read_lines(disk / FILE)
        (disk / "filler").unlink()
        done(file, disk)
        assert read_lines(disk / FILE)[: len(kept)] == kept
        assert len(read_lines(disk / FILE)) == 1 + 2


@pytest.mark.cluster
def test_on_ray_a_run_has_the_same_bits_and_the_same_line(tmp_path):
    plan = plan_of(tmp_path, budget=70, set={**STUDY["set"], "output": str(tmp_path / "runs")})
    case = plan.runs("one", "tree", 1e-3)[0]
    lines = {}
    for on in ("process", "ray"):
        with workers(on, 1, tmp_path / on) as pool:
            ((_, found),) = pool.each([case])
        lines[on] = {line["kind"]: line for line in found}
    (here,), on_ray = lines["process"].values(), lines["ray"]
    assert here.keys() == on_ray["run"].keys()
    for part in ("key", "adapter", "scores", "evaluations", "states", "updates", "settings", "budget", "lr"):
        assert on_ray["run"][part] == here[part]
    ends = [(line["curve"][-1]["iteration"], line["curve"][-1]["cost"]) for line in (here, on_ray["run"])]
    assert ends[0] == ends[1] == (3, 60)
    assert on_ray["base"]["key"] == case.base
    assert (tmp_path / "process" / "pictures" / f"{case.key}.png").read_bytes() == (
        tmp_path / "ray" / "pictures" / f"{case.key}.png"
    ).read_bytes()


@contextmanager
def study_on_ray(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A study whose first run has done two iterations, and the directory of this run."""
    settings = {**STUDY["set"], "output": str(tmp_path / "runs"), "checkpoint": {"every": 1000}}
    file = study_file(tmp_path, runner="ray", budget=4000, set=settings)
    process = subprocess.Popen(
        command(file, tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def done() -> list[Path]:
        return [log for log in (tmp_path / "runs" / "tiny").glob("*/metrics.jsonl") if len(read_lines(log)) >= 2]

    try:
        wait_for(process, done)
        (log,) = done()
        yield process, log.parent
    finally:
        if process.poll() is None:
            kill_all(process)


def ended_in_a_line(process: subprocess.Popen, children: list[psutil.Process]) -> None:
    printed, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert printed.splitlines()[-1] == STOPPED
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.cluster
def test_told_to_end_a_study_on_ray_ends_its_run_at_a_safe_place(tmp_path):
    with study_on_ray(tmp_path) as (process, run):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        ended_in_a_line(process, children)
    kept = int((run / "checkpoints" / "LATEST").read_text())
    assert kept == read_lines(run / "metrics.jsonl")[-1]["iteration"] >= 1
    with Lease(Folder(run)):
        pass  # given back


@pytest.mark.cluster
def test_told_twice_a_study_on_ray_ends_its_run_at_once(tmp_path):
    with study_on_ray(tmp_path) as (process, run):
        children = psutil.Process(process.pid).children(recursive=True)
        (learner,) = actors_of(process, "ray::LearnerRank")
        learner.suspend()  # so that no safe place comes
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        ended_in_a_line(process, children)
        assert time.monotonic() - told < 12  # 3 on idle cores; 18 without the second signal
    with Lease(Folder(run)):
        pass


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_a_study_that_is_told_to_end_says_one_line_and_leaves_no_process(how, tmp_path):
    file, out = study_file(tmp_path, set={**STUDY["set"], "output": str(tmp_path / "runs")}), tmp_path / "out"
    process = subprocess.Popen(command(file, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: len(read_lines(out / FILE)) >= 1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(how)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] == STOPPED
    assert not re.search("[Ww]arning|Traceback", told)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_reward_that_hangs_ends_the_study_in_a_line(tmp_path, capfd):
    settings = STUDY["set"] | {"output": str(tmp_path / "runs"), "hung_after_s": 20}
    settings["rewards"] = {"preference": None, "asleep": {"kind": "tests.support.faulty:build_sleeper"}}
    file, others = study_file(tmp_path, set=settings), set(multiprocessing.active_children())
    assert main([str(file), "--output", str(tmp_path / "out"), "--jobs", "1"]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: one: base")
    assert line.endswith("no progress for hung_after_s; the same command resumes from the record")
    assert set(multiprocessing.active_children()) == others
