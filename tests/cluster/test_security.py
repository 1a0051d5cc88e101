"""Clusters that are closed to strangers, and secrets that no file has."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from tests.support.judge_server import KEY, chat_server
from tests.support.runs import (
    PATIENCE,
    command,
    descendants,
    head_command,
    kill_all,
    listens,
    metrics,
    title_of,
    wait_for,
)
from tests.support.touched import touched  # noqa: F401  fixtures

PORT, DASHBOARD = 6396, 8296

BINARIES = Path(sys.executable).parent

TOKEN, WRONG = "0123456789abcdef" * 4, "fedcba9876543210" * 4

MARK = "not-to-be-written-anywhere"  # in the environment under a name of its own

REFUSED = {
    "no token": {"RAY_AUTH_MODE": "token"},
    "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG},
    "a client that knows of no tokens": {"RAY_AUTH_MODE": "disabled"},
}


def environment(home, variables):
    """That of the tests, with these variables alone to say who asks."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return {**own, "HOME": str(home), "PATH": f"{BINARIES}:{own['PATH']}", **variables}


def ask(words, home, variables):
    return subprocess.run(
        words, env=environment(home, variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip


def submit(*entry):
    return [BINARIES / "ray", "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}", "--", *entry]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Without a token of an earlier Ray."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def guarded(home):
    """A cluster that wants a token, its nodes with secrets in their environment: its variables."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "JUDGE_KEY": KEY, "SOMETHING_ELSE": MARK}
    head = subprocess.Popen(
        head_command(PORT, f"--dashboard-port={DASHBOARD}", "--dashboard-host=127.0.0.1", "--num-cpus=2",
                     "--object-store-memory=200000000"),
        env=environment(home, variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(head, lambda: listens(PORT) and listens(DASHBOARD))
        wait_for(head, lambda: ask(submit("true"), home, variables).returncode == 0)  # its agent may come later
        yield variables
    finally:
        kill_all(head)


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("case", REFUSED)
def test_a_cluster_is_closed_to(case, guarded, home, tmp_path):
    check = command(tmp_path / "runs", "x", "--check", "--address", f"127.0.0.1:{PORT}")
    done = ask(check, home, REFUSED[case])
    told = [line for line in done.stdout.splitlines() if line.startswith("error: ")]  # below the plan
    assert done.returncode == 2
    assert len(told) == 1, done.stdout
    assert told[0].startswith(f"error: --address: the Ray cluster at 127.0.0.1:{PORT} requires a token")
    job = ask(submit("touch", str(tmp_path / "touched")), home, REFUSED[case])
    assert job.returncode != 0
    assert "uthentication" in job.stdout
    assert not list(tmp_path.iterdir())
    for printed in (done.stdout, job.stdout):
        assert not leaks(printed.encode())


def test_the_dashboard_tells_nothing_without_the_token(guarded):
    for path in ("api/jobs/", "nodes?view=summary", "api/v0/actors"):
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"http://127.0.0.1:{DASHBOARD}/{path}")


def test_a_private_cluster_has_a_token_that_nobody_can_see(tmp_path):
    """Whose ports are open to the network."""
    program = (
        "from actors.cluster import cluster\n"
        "with cluster(None):\n"
        "    import ray; print(ray.get_runtime_context().gcs_address, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment(tmp_path, {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as owner:  # fmt: skip
        address = owner.stdout.readline().strip()
        processes = descendants(owner)
        (token,) = {token_of(process) for process in processes} - {None}  # workers hide theirs
        assert len(token) == 64
        assert token not in " ".join(map(title_of, processes))
        check = command(tmp_path / "runs", "x", "--check", "--address", address)
        assert "requires a token" in ask(check, tmp_path, {"RAY_AUTH_MODE": "disabled"}).stdout
        owner.communicate("\n")


def token_of(process):
    try:
        return process.environ().get("RAY_AUTH_TOKEN")
    except psutil.NoSuchProcess:  # it ended meanwhile
        return None


# ------------------------------------------------------------------------------------------------------------ secrets


def leaks(content):
    """Which secrets some bytes hold."""
    return [secret for secret in (TOKEN, WRONG, KEY, MARK) if secret.encode() in content]


@pytest.mark.slow
def test_a_run_with_the_token_works_and_writes_down_no_secret(guarded, home, tmp_path):
    """A reward's key and the token come by the environment, and stay there."""
    with chat_server(KEY) as url:
        judge = {"kind": "unified_reward", "options": {"base_urls": url, "api_key_env": "JUDGE_KEY"}, "resources": {}}
        entry = command(
            tmp_path, "secretive", iterations=1, eval_rewards={"judge": judge}, tracking__tensorboard="true"
        )
        done = ask(submit("python", *entry[1:]), home, guarded)
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    assert metrics(tmp_path, "secretive")[1]["eval/judge/mean"] == 3  # the judge had its key
    assert not leaks(done.stdout.encode())
    run = tmp_path / "secretive"
    assert "JUDGE_KEY" in (run / "config.yaml").read_text()  # its name alone
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "tensorboard"} <= {path.relative_to(run).parts[0] for path in files}
    for path in files:
        assert not leaks(path.read_bytes()), path
