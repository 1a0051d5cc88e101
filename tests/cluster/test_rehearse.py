"""A rehearsal through Ray: a killed actor, a stop, a resume, and several ranks, on the twin of a model."""

import os
import subprocess
import sys

import pytest

from tests.support.runs import PATIENCE, metrics


@pytest.mark.timeout(4 * PATIENCE)
def test_a_rehearsal_loses_an_actor_is_stopped_and_resumed_by_as_many_ranks_as_there_are_cores(tmp_path):
    """Of a configuration that asks for 5 GPUs for the learner alone."""
    given = ["data.prompts_per_iteration=1", "evaluation.seeds=1", "model.dtype=float32", "sampler.roots=6"]
    command = [sys.executable, "-m", "g2rpo_ray.rehearse", "--config", "sd3_diffusion_nft", "--output", tmp_path]
    environment = dict(os.environ)
    environment.pop("RAY_RUNTIME_ENV_HOOK", None)  # of tests/support/preloaded.py, whose workers have another parent
    sets = [part for one in given for part in ("--set", one)]
    done = subprocess.run(
        [*command, *sets], env=environment, capture_output=True, text=True, timeout=3 * PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = min(5, len(os.sched_getaffinity(0)))
    assert f"one of them killed, and {ranks} learner ranks; stopped after the first, resumed" in done.stdout
    lines = metrics(tmp_path, "sd3_diffusion_nft")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert lines[1]["pool/restarts"] == 1
    assert (tmp_path / "sd3_diffusion_nft" / "report.html").exists()
    assert (tmp_path / "sd3_diffusion_nft" / "checkpoints" / "000001").exists()
