"""Two private runs on a machine are told apart."""

import json
import stat
import subprocess
import sys

import pytest

from tests.support.runs import actors_of, finish, kill_all, start, wait_for

APART = {"rollout__completions__max_actors": 1, "rollout__completions__resources": "{CPU: 0}"}
RUNS = {"one": {}, "two": APART}
LOOK = "rollout: resized from 1 to 2 actors"


def scale(output, *arguments):
    command = [sys.executable, "-m", "g2rpo_ray.scale", "--output", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.cluster
def test_two_private_runs_on_a_machine_are_told_apart(tmp_path):
    processes = {name: start(tmp_path, name, iterations=400, **given) for name, given in RUNS.items()}
    try:
        for name, process in processes.items():
            wait_for(process, lambda name=name: "actors are ready" in log(tmp_path, name))
        access = tmp_path / "one" / "ray.json"
        assert stat.S_IMODE(access.stat().st_mode) == 0o600
        first, second = (json.loads((tmp_path / name / "ray.json").read_text()) for name in processes)
        assert first["address"] != second["address"]
        refused = scale(tmp_path, "--name", "one", "--rollout", "100000000000")
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
        done = scale(tmp_path, "--name", "one", "--rollout", "2")
        assert done.returncode == 0, done.stderr
        wait_for(processes["one"], lambda: LOOK in log(tmp_path, "one"))
        assert LOOK not in log(tmp_path, "two")
        refused = scale(tmp_path, "--name", "one", "--completions", "2")
        assert "--completions: 2 given, but in this run rollout actors" in refused.stderr
        done = scale(tmp_path, "--name", "two", "--completions", "2")
        assert done.returncode == 0, done.stderr
        wait_for(processes["two"], lambda: "completions: resized from 1 to 2 actors" in log(tmp_path, "two"))
        (control,) = actors_of(processes["one"], "ray::Control")
        control.suspend()
        hung = scale(tmp_path, "--name", "one", "--rollout", "1")
        assert hung.returncode == 2
        assert hung.stderr.splitlines()[-1].startswith("error: --name: run 'one' did not answer within 30 s")
        assert "Traceback" not in hung.stderr
        control.resume()
        processes["one"].terminate()
        finish(processes["one"], 130)
        assert not access.exists()
        assert (tmp_path / "two" / "ray.json").exists()
    finally:
        for process in processes.values():
            if process.poll() is None:
                kill_all(process)


def log(output, name):
    path = output / name / "run.log"
    return path.read_text() if path.exists() else ""
