import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from tests.runs import finish, kill_all, lora, run, start


def pytest_configure():
    """Processes that run tests side by side must not find each other's clusters, as `ray` does by RAY_TMPDIR."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.mkdtemp()) / worker  # short: Ray's sockets are in it
        folder.mkdir()
        os.environ["RAY_TMPDIR"] = str(folder)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors are slower on two threads, by far where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium; CI installs it, elsewhere tests in a browser may be skipped."""
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
    """A small run that nothing disturbs, with two rollout actors: its output folder and what it printed."""
    output = tmp_path_factory.mktemp("reference")
    return output, run(output, "reference", rollout__max_actors=2)


@pytest.fixture(scope="session")
def long_reference(tmp_path_factory):
    """The tensors of 20 iterations, for nodes to come and go in; it runs beside the first test that asks."""
    output = tmp_path_factory.mktemp("long")
    process = start(output, "long", iterations=20)

    @functools.cache
    def tensors():
        finish(process)
        return lora(output, "long")

    yield tensors
    if process.poll() is None:
        kill_all(process)
