"""Rewards in environments of their own, made by Ray from local wheels: two versions of a package side by side."""

import json
import os
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.runs import PATIENCE, command, metrics

ROOT = Path(__file__).parents[2]

REWARD = """
import numpy as np
VERSION = {version}

class Taste:
    def score(self, images, prompts):
        return VERSION * images.mean((1, 2, 3)).astype(np.float32)

build = Taste
"""


def wheel(folder: Path, version: int) -> str:
    """The path of a wheel of the package `taste`, which has no metadata that an installer does not need."""
    path = folder / f"taste-{version}-py3-none-any.whl"
    info = f"taste-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("taste.py", REWARD.format(version=version))
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: taste\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"taste.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return str(path)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A small environment that has this one's packages: Ray copies the environment of a cluster for each of its own."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(home / "bin" / "python")


@pytest.mark.cluster
def test_rewards_that_can_not_share_an_environment_run_side_by_side(tmp_path, python):
    rewards = {
        f"v{version}": {
            "kind": "taste:build",
            "resources": {},
            "runtime_env": {"pip": {"packages": ["--no-index", wheel(tmp_path, version)], "pip_check": False}},
        }
        for version in (1, 2)
    }
    sets = [f"rewards={json.dumps(rewards)}", "rewards.preference=null"]
    given = command(tmp_path, "both", *(part for one in sets for part in ("--set", one)), iterations=1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RAY_RUNTIME_ENV_HOOK", None)  # of tests/support/preloaded.py, whose workers are of one environment
    done = subprocess.run(
        [python, *given[1:]], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = metrics(tmp_path, "both")[1]
    assert line["reward/v2/mean"] == pytest.approx(2 * line["reward/v1/mean"], rel=1e-6)
    assert line["reward/v1/missing"] == line["reward/v2/missing"] == 0
