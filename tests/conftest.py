import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from pyarrow import fs

from tests.support import preloaded
from tests.support.runs import PREFERENCE, free_port, kill_all, listens, run, wait_for

TESTS = Path(__file__).parent

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")  # how long an example takes says how busy the cores are


def pytest_configure(config):
    """What processes that tests start inherit: one thread each, their share of the cores, a folder for Ray's clusters,
    and the process that forks, which is one for all.

    Tiny tensors are slower on two threads, by far where the cores are busy. Processes that run tests side by side must
    not find each other's clusters, as `ray` does by RAY_TMPDIR.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else tests beside them, which are at 0, starve actors
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.mkdtemp()) / worker  # short: Ray's sockets are in it
        folder.mkdir()
        os.environ["RAY_TMPDIR"] = str(folder)
    else:
        forking = ExitStack()
        forking.enter_context(preloaded.serving())
        config.add_cleanup(forking.close)


def pytest_collection_modifyitems(items):
    """A test has its folder's marker. Files that start Ray or are slow come first.

    So no worker is left alone with minutes of them at the end.
    """
    for item in items:
        if (level := item.path.relative_to(TESTS).parts[0]) in ("cluster", "slow"):
            item.add_marker(level)
    long = ("cluster", "slow")
    clusters = Counter(item.path for item in items if any(map(item.get_closest_marker, long)))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-clusters[item.path], -tests[item.path], item.path))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """In this process, too, which had loaded torch before."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def workers_are_preloaded(request):
    """Of Ray, for a file that starts it."""
    if not any(item.path == request.path and item.get_closest_marker("cluster") for item in request.session.items):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in preloaded.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; CI installs it, elsewhere tests in a browser may be skipped.

    Of one file: while playwright is there, its event loop runs, and no test of this process can run its own.
    """
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # tests may run as root
        yield started
        started.close()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A small run that nothing disturbs, with two rollout actors and the quickstart's reward.

    Its output folder and what it printed.
    """
    output = tmp_path_factory.mktemp("reference")
    return output, run(output, "reference", rollout__max_actors=2, **PREFERENCE)


@pytest.fixture(scope="session")
def alone():
    """Small runs in one process without Ray; see tests/support/alone.py."""
    from tests.support.alone import one_process  # loads diffusers, which few tests need

    with one_process() as run_alone:
        yield run_alone


@pytest.fixture(scope="session")
def bits(alone):
    """The adapter of a small run that nothing disturbs."""
    return alone().result().lora


@pytest.fixture(scope="session")
def long_bits(alone):
    """The same of 20 iterations, for nodes to come and go in; done beside the first test that asks."""
    return alone(iterations=20)


@pytest.fixture(scope="module")
def bucket():
    """The URI of an empty bucket on a moto server, which speaks S3."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    settings = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "s3cr3t", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        wait_for(server, lambda: listens(port))
        query = f"region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}"
        server_itself, _ = fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
        server_itself.create_dir("bucket")
        yield f"s3://bucket/runs?{query}"
        kill_all(server)
