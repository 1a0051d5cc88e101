"""Ray as KubeRay starts it: as process 1 of a container, stopped by `ray job stop`, its head lost."""

import os
import shlex
import socket
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from g2rpo_ray.record.checkpoint import find_checkpoint
from g2rpo_ray.record.storage import Folder
from tests.runs import PATIENCE, command, head_command, kill_all, metrics, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BINARIES = Path(sys.executable).parent
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
ENTRY_POINT = ["bash", "-c", 'ulimit -n 4096; "$0" "$@"']  # bash becomes the last command, as in the operator's
PAUSE = ["sh", "-c", '"$@" & wait', "pause"]  # process 1 where pods share a process namespace: it reaps any child
STOP_WAIT_S = 60  # RAY_JOB_STOP_WAIT_TIME_S, which is 900 in deploy/


def tls(folder: Path) -> dict[str, str]:
    """Variables as the operator sets them with `tlsOptions`, with a certificate of a new authority."""
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=ray"]
    for name, more in {
        "ca": [],
        "tls": ["-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
    }.items():
        made = [*new, "-keyout", f"{name}.key", "-out", f"{name}.crt", *more]
        subprocess.run(made, cwd=folder, check=True, capture_output=True)
    files = {"SERVER_CERT": "tls.crt", "SERVER_KEY": "tls.key", "CA_CERT": "ca.crt"}
    return {"RAY_USE_TLS": "1", **{f"RAY_TLS_{key}": str(folder / file) for key, file in files.items()}}


def encrypted(port: int, variables: dict[str, str]) -> bool:
    """Whether the server at a port has the authority's certificate."""
    context = ssl.create_default_context(cafile=variables["RAY_TLS_CA_CERT"])
    context.load_cert_chain(variables["RAY_TLS_SERVER_CERT"], variables["RAY_TLS_SERVER_KEY"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        return context.wrap_socket(plain, server_hostname="127.0.0.1").getpeercert() is not None


def environment(home: Path, **variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    path = f"{BINARIES}:{own['PATH']}"  # as in an activated environment
    return {**own, "RAY_AUTH_MODE": "disabled", "HOME": str(home), "PATH": path, **variables}


@contextmanager
def head_as_process_1(home: Path, init: list[str], port: int, variables: dict[str, str]):
    """A client of a head that runs in a PID namespace of its own."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a PID namespace here")
    dashboard = port + 3000
    options = [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
    ray = head_command(port, *options, "--object-store-memory=200000000")
    head = subprocess.Popen(
        [*CONTAINER, *init, *ENTRY_POINT, *ray], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(home, RAY_JOB_STOP_WAIT_TIME_S=str(STOP_WAIT_S), **variables),
    )  # fmt: skip
    try:
        yield head, client_of(head, dashboard)
    finally:
        if head.poll() is None:
            kill_all(head)


def client_of(head: subprocess.Popen, dashboard: int) -> JobSubmissionClient:
    """Once the dashboard takes jobs, which is later than it answers."""
    clients = []

    def takes_jobs() -> bool:
        try:
            client = JobSubmissionClient(f"http://127.0.0.1:{dashboard}")
            client.submit_job(entrypoint="true")
        except (ConnectionError, RuntimeError):
            return False
        clients.append(client)
        return True

    wait_for(head, takes_jobs)
    return clients[0]


def seconds_to_stop(client: JobSubmissionClient, job: str) -> float:
    asked = time.monotonic()
    client.stop_job(job)
    while client.get_job_status(job) != JobStatus.STOPPED:
        assert time.monotonic() < asked + PATIENCE, client.get_job_status(job)
        time.sleep(0.1)
    return time.monotonic() - asked


@pytest.mark.parametrize("case", ["exec, encrypted", "no exec, process 1 reaps"])
def test_ray_job_stop_ends_a_run_with_its_work_saved(tmp_path, case):
    """Ray's supervisor sees the driver's end: no shell is between them, or somebody reaps what the shell leaves."""
    output, by_exec = tmp_path / "runs", case.startswith("exec")
    variables, init, port = (tls(tmp_path), [], 6401) if by_exec else ({}, PAUSE, 6402)
    entry = shlex.join(command(output, "stopped", checkpoint__every=100, iterations=100))
    with head_as_process_1(tmp_path, init, port, variables) as (head, client):
        job = client.submit_job(entrypoint=f"exec {entry}" if by_exec else entry)
        wait_for(head, lambda: any(line["iteration"] >= 1 for line in metrics(output, "stopped")))
        assert not variables or encrypted(port, variables)
        took = seconds_to_stop(client, job)
        if by_exec:  # process 1 is Ray, which reaps nobody: without `exec` the same stop hangs
            orphaned = client.submit_job(entrypoint="sleep 1000")
            wait_for(head, lambda: client.get_job_status(orphaned) == JobStatus.RUNNING)
            time.sleep(1)
            client.stop_job(orphaned)
            time.sleep(5)
            assert client.get_job_status(orphaned) == JobStatus.RUNNING
    print(f"{case}: stopped after {took:.1f} s")
    assert took < STOP_WAIT_S / 2
    done = int((output / "stopped" / "checkpoints" / "LATEST").read_text())
    assert find_checkpoint(Folder(output / "stopped")).iteration == done >= 1
