"""One process at a time writes a run: the lease, taken by real processes, which are killed and stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from g2rpo_ray.runs.lease import LEASE, Lease
from g2rpo_ray.runs.storage import Folder

HOLD = """
import sys, time
from g2rpo_ray.runs import lease
from g2rpo_ray.runs.storage import Folder
lease.RENEW_EVERY_S, lease.STALE_AFTER_S, lease.SETTLE_S = 0.2, 2.0, 0.5

class Slow(Folder):
    "A disk that takes its time over a file."

    def write(self, file, content):
        print("writing", flush=True)
        time.sleep(0.3)
        super().write(file, content)

try:
    run = (Slow if "slow" in sys.argv else Folder)(sys.argv[1])
    with lease.Lease(run, wait_s=60 if "wait" in sys.argv else 0) as held:
        print("held", flush=True)
        if "busy" in sys.argv:
            sum(i * i for i in range(3 * 10**7))  # holds the interpreter, as an event loop that stands still
        while True:
            held.check()
            time.sleep(0.05)
except (ValueError, lease.LeaseLost) as error:
    print(error, flush=True)
"""


@pytest.fixture
def tmp_path(tmp_path):
    """A run directory that is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def hold():
    """Start a process that takes the lease and holds it."""
    started = []

    def start(run, *arguments, before=()):
        process = subprocess.Popen(
            [*before, sys.executable, "-c", HOLD, str(run), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_process_is_told_who_holds_the_run(hold, tmp_path):
    first = hold(tmp_path)
    assert first.stdout.readline() == "held\n"
    since = json.loads((tmp_path / LEASE).read_text())["since"]
    refusal = hold(tmp_path).stdout.readline()
    assert refusal.startswith(f"{tmp_path} is in use by process {first.pid} on ")
    assert since in refusal
    assert "--name" in refusal


def test_the_lease_of_a_killed_process_is_taken_at_once_and_given_back(hold, tmp_path):
    first = hold(tmp_path)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    begin = time.monotonic()
    with Lease(Folder(tmp_path)):
        assert time.monotonic() - begin < 1
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()
    assert not tmp_path.exists()  # nothing was written


@pytest.mark.parametrize("at", ["here", "elsewhere"])
def test_a_process_may_wait_for_the_end_of_another(at, hold, elsewhere, tmp_path):
    first = hold(tmp_path)
    assert first.stdout.readline() == "held\n"
    second = hold(tmp_path, "wait", before=elsewhere if at == "elsewhere" else ())
    assert f"held by process {first.pid} on" in (told := second.stderr.readline())
    assert "s for it to end" in told
    time.sleep(3)  # longer than an elsewhere's holder may be silent
    assert second.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert second.stdout.readline() == "held\n"


def test_a_process_id_that_was_given_again_is_another_process(tmp_path):
    with Lease(Folder(tmp_path)) as lease:
        lease.check()
        held = json.loads((tmp_path / LEASE).read_text())
    Folder(tmp_path).write(LEASE, json.dumps({**held, "started": "12"}).encode())
    with Lease(Folder(tmp_path)):
        pass


@pytest.mark.parametrize("damage", [{"pid": None}, {"pid": "12"}, {"started": None}])
def test_a_lease_that_lacks_a_field_is_taken(damage, tmp_path, monkeypatch):
    monkeypatch.setattr("g2rpo_ray.runs.lease.STALE_AFTER_S", 0.1)
    with Lease(Folder(tmp_path)):
        held = json.loads((tmp_path / LEASE).read_text()) | damage
    lease = {name: value for name, value in held.items() if value is not None}
    Folder(tmp_path).write(LEASE, json.dumps(lease).encode())
    with Lease(Folder(tmp_path)):
        assert json.loads((tmp_path / LEASE).read_text())["token"] != held["token"]


def test_of_many_that_start_at_once_one_holds_it(hold, tmp_path):
    said = [process.stdout.readline() for process in [hold(tmp_path) for _ in range(4)]]
    assert sum(line == "held\n" for line in said) == 1
    assert sum("is in use by process" in line for line in said) == 3


@pytest.fixture
def elsewhere():
    """A namespace of process ids of its own is another machine: what is known of the holder is its lease alone."""
    command = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a namespace: see tests/isolated")
    return command


def test_on_another_machine_a_busy_holder_lives_and_one_that_stands_still_is_replaced(hold, elsewhere, tmp_path):
    first = hold(tmp_path, "busy")
    assert first.stdout.readline() == "held\n"
    second = hold(tmp_path, before=elsewhere)
    assert f"in use by process {first.pid} on" in second.stdout.readline()
    assert "waiting up to 2 s for it to renew its lease" in second.stderr.readline()
    os.killpg(first.pid, signal.SIGSTOP)
    third = hold(tmp_path, before=elsewhere)
    assert third.stdout.readline() == "held\n"
    os.killpg(first.pid, signal.SIGCONT)
    assert f"{tmp_path} was taken over by process " in first.stdout.readline()
    assert first.wait(60) == 0
    assert third.poll() is None


def test_a_holder_that_stood_still_while_it_wrote_the_lease_does_not_get_it_back(hold, elsewhere, tmp_path):
    """It had read that the lease is its own, and overwrites that of the process which took it meanwhile."""
    first = hold(tmp_path, "slow")
    assert [first.stdout.readline() for _ in range(3)] == ["writing\n", "held\n", "writing\n"]
    os.killpg(first.pid, signal.SIGSTOP)
    second = hold(tmp_path, before=elsewhere)
    assert second.stdout.readline() == "held\n"
    token = json.loads((tmp_path / LEASE).read_text())["token"]
    os.killpg(first.pid, signal.SIGCONT)
    assert f"{tmp_path} was taken over by process " in first.stdout.read()
    assert second.poll() is None
    assert json.loads((tmp_path / LEASE).read_text())["token"] == token


def test_on_object_storage_too(hold, bucket):
    run = Folder(bucket) / "leased"
    pair = [hold(run), hold(run)]
    said = sorted(process.stdout.readline() for process in pair)
    assert said[0] == "held\n"
    assert "is in use by process" in said[1]
    for process in pair:
        process.kill()
        process.wait()
    assert hold(run).stdout.readline() == "held\n"
