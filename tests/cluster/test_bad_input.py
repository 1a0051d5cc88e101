"""What a cluster cannot do is refused in one line."""

import pytest

from tests.support.refusals import refused

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--set", "learner.resources={GPU: 1}", "--set", "learner.ranks=8"],
            ["learner.resources: the run asks for 8 GPU in all", "the cluster has 0"],
        ),
        (["--set", "rollout.resources={CPU: 1000}"], ["rollout.resources: the run asks for 1000 CPU in all"]),
        (["--address", "127.0.0.1:1"], ["--address: no Ray cluster at 127.0.0.1:1"]),
    ],
    ids=["more GPUs than there are", "more CPUs than there are", "no cluster there"],
)
def test_a_cluster_that_cannot_do_it_is_one_line_and_status_2(arguments, parts, tmp_path):
    refused(arguments, parts, tmp_path)


def test_a_private_ray_that_does_not_start_is_one_line_and_status_2(tmp_path, monkeypatch):
    """Its sockets are below RAY_TMPDIR, and a socket's path has 107 bytes at most."""
    long = tmp_path.parent / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    refused([], ["Ray does not start on this machine (", "107 bytes", "RAY_TMPDIR"], tmp_path)
