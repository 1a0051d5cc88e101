"""A run whose processes stand still, or whose Ray is gone: it goes on, or ends in a line, in time."""

import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from g2rpo_ray.runs.watchdog import LINE
from tests.support.runs import (
    actors_of,
    descendants,
    finish,
    metrics,
    run,
    start,
    wait_for,
    wait_for_iteration,
)

pytestmark = pytest.mark.cluster


def one_of(process, title) -> psutil.Process:
    found: list[psutil.Process] = []
    wait_for(process, lambda: found.extend(actors_of(process, title)) or found)
    return found[0]


def ray_process(process, what) -> psutil.Process:
    """A process of the run's private Ray: `gcs_server`, `raylet`, or an agent by its title."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == what or what in " ".join(child.cmdline()[:1]):
            return child
    raise AssertionError(f"no {what}")


def test_ctrl_c_ends_a_run_whose_learner_stands_still(tmp_path):
    process = start(tmp_path, "stuck")
    wait_for_iteration(process, tmp_path, "stuck", 1)
    one_of(process, "LearnerRank").send_signal(signal.SIGSTOP)
    time.sleep(3)
    assert seconds_to_end(process, 130) < 30


def seconds_to_end(process, status) -> float:
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    finish(process, status)
    return time.monotonic() - began


LOST = "error: ClusterLost: the Ray cluster is lost: "


@pytest.mark.parametrize(("what", "lines"), [("gcs_server", (LOST,)), ("ray::DashboardAgent", (LOST, LINE))])
def test_a_private_ray_that_dies_ends_the_run_in_a_line(what, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    process = start(tmp_path, "lost", iterations=200)
    latest = tmp_path / "lost" / "checkpoints" / "LATEST"
    wait_for(process, latest.exists)
    ray_process(process, what).kill()
    began = time.monotonic()
    told = [line for line in finish(process, status=1).splitlines() if line.startswith("error: ")]
    print(f"{what} killed: ended after {time.monotonic() - began:.0f} s")
    assert len(told) == 1
    assert told[0].startswith(lines)
    assert (tmp_path / "lost" / "error.log").exists()
    done = int(latest.read_text())
    run(tmp_path, "lost", iterations=done + 1)
    assert [line["iteration"] for line in metrics(tmp_path, "lost")] == list(range(done + 2))


def test_ctrl_c_ends_a_run_whose_head_is_gone(tmp_path):
    process = start(tmp_path, "headless", iterations=30)
    wait_for_iteration(process, tmp_path, "headless", 1)
    ray_process(process, "gcs_server").kill()
    time.sleep(3)
    assert seconds_to_end(process, 130) < 30


def ends_by_itself(program: str) -> str:
    """What a program prints that ends in time and leaves no process."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "inside\n"
    children = descendants(process)
    assert children
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 0
    assert not re.search("Traceback|error:", told)
    assert not psutil.wait_procs(children, timeout=10)[1]
    return printed


def test_a_ray_that_does_not_shut_down_is_left():
    program = (
        "import time; from g2rpo_ray.actors import cluster; cluster.SHUTDOWN_S = 2\n"
        "with cluster.cluster(None):\n"
        "    import ray; ray.shutdown = lambda: time.sleep(1000); print('inside', flush=True)\n"
        "print('left', flush=True); cluster.leave(0)"
    )
    assert ends_by_itself(program) == "left\n"


def test_a_watchdog_that_does_not_end_is_left():
    """A process that was forked, and runs no other program, has the pipe that it listens to."""
    program = (
        "import os, signal, time; from g2rpo_ray.runs import watchdog; watchdog.SHUTDOWN_S = 2\n"
        "with watchdog.watchdog(None):\n"
        "    if not (child := os.fork()): time.sleep(1000)\n"
        "    print('inside', flush=True)\n"
        "print('left', flush=True); os.kill(child, signal.SIGKILL)"
    )
    assert ends_by_itself(program) == "left\n"
