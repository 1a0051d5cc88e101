"""The image, where there is a builder."""

import re
import shutil
import subprocess

import pytest

from tests.support.manifests import DEPLOY, ROOT


def test_a_builder_that_is_there_builds_the_project(tmp_path):
    """Up to the wheel: the packages take gigabytes."""
    builder = next((name for name in ("docker", "podman", "buildah") if works(name)), None)
    if builder is None:
        pytest.skip("no docker, podman or buildah works here")
    build = [builder, "build", "-f", DEPLOY / "Dockerfile", "--target", "project", ROOT]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if re.search("pull|registry|not found|resolve", done.stderr) and done.returncode:
        pytest.skip(f"{builder} has no base image here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def works(builder: str) -> bool:
    return (
        bool(shutil.which(builder))
        and not subprocess.run([builder, "info"], capture_output=True, check=False).returncode
    )
