"""The whole system on Ray, by its command line: determinism, faults, interruption, resume."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs import (
    PATIENCE,
    command,
    descendants,
    finish,
    head_command,
    kill_all,
    kill_at_work,
    listens,
    lora,
    metrics,
    recovery,
    run,
    same_lora,
    start,
    wait_for,
    wait_for_iteration,
)

pytestmark = pytest.mark.cluster


def test_a_run_leaves_what_the_documentation_promises(reference):
    output, printed = reference
    folder = output / "reference"
    lines = metrics(output, "reference")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        # T + G · Σ_i (nodes of the branch's paths before the image, those that paths share counted once), 2 prompts:
        # 1, 2, 3, 4 and 1, 2, 4 share 1 and 2; the paths from step 2, both 3, 4, are one, and so is its image
        assert line["rollout/evaluations"] == 2 * (5 + 4 * ((4 + 1) + 2))
        assert line["rollout/images"] == 2 * (1 + 4 * (2 + 1))
        assert line["rollout/weights_version"] == line["iteration"] - 1
        assert line["actor/ratio_initial_max_dev"] <= 1e-6
        assert line["actor/ratio_max_dev_step/1"] > 1e-6  # the second step of per_step leaves 1
        assert {"reward/preference/mean", "reward/preference/std", "eval/preference/mean"} <= line.keys()
        assert {"signal/agreement/2", "signal/spread/0", "signal/spread/2"} <= line.keys()
        assert {"advantage/abs_max", "actor/loss", "actor/grad_norm", "actor/clip_fraction"} <= line.keys()
        assert {"timing_s/step", "timing_s/rollout", "timing_s/update", "timing_s/broadcast"} <= line.keys()
    assert "heldout/preference/mean" in lines[0]
    assert "heldout/preference/mean" in lines[3]
    for name in ("config.yaml", "summary.json", "samples/000003.png", "checkpoints/LATEST", "checkpoints/000003/lora"):
        assert (folder / name).exists(), name
    assert "| preference (trained) |" in printed
    assert any(np.abs(tensor).max() > 0 for name, tensor in lora(output, "reference").items() if "lora_B" in name)


def test_the_number_of_actors_changes_no_bit(reference, tmp_path):
    run(tmp_path, "one", rewards__preference__replicas=2, data__embeddings="null")
    assert (tmp_path / "one" / "embeddings").exists()
    same_lora(lora(tmp_path, "one"), lora(reference[0], "reference"))


def test_a_rollout_actor_killed_in_mid_iteration_changes_no_bit(reference, tmp_path):
    process = start(tmp_path, "killed")
    wait_for_iteration(process, tmp_path, "killed", 1)
    kill_at_work(process, "RolloutActor.compute")
    finish(process)
    assert recovery(tmp_path, "killed", " died: ", "rollout-1 on") < PATIENCE
    same_lora(lora(tmp_path, "killed"), lora(reference[0], "reference"))
    assert sum(line.get("rollout/restarts", 0) for line in metrics(tmp_path, "killed")) == 1
    assert sum(line.get("rollout/units_retried", 0) for line in metrics(tmp_path, "killed")) == 1


def test_a_killed_driver_goes_on_from_its_checkpoint_to_the_same_bits(reference, tmp_path):
    process = start(tmp_path, "resumed")
    wait_for(process, lambda: (tmp_path / "resumed" / "checkpoints" / "LATEST").exists())
    kill_all(process)
    run(tmp_path, "resumed")
    assert recovery(tmp_path, "resumed", "resumed: starting the actors", "resumed: actors are ready") < PATIENCE
    same_lora(lora(tmp_path, "resumed"), lora(reference[0], "reference"))
    assert [line["iteration"] for line in metrics(tmp_path, "resumed")] == [0, 1, 2, 3]
    expected = [line["reward/preference/mean"] for line in metrics(reference[0], "reference")[1:]]
    assert [line["reward/preference/mean"] for line in metrics(tmp_path, "resumed")[1:]] == expected


def test_ctrl_c_saves_and_leaves_nothing_running_and_the_same_command_goes_on(reference, tmp_path):
    process = start(tmp_path, "stopped", checkpoint__every=100)
    wait_for_iteration(process, tmp_path, "stopped", 1)
    children = descendants(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes, too
    printed = finish(process, status=130)
    assert "Traceback" not in printed
    assert "is saved: the same command goes on from there" in printed
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]
    run(tmp_path, "stopped", checkpoint__every=100)
    same_lora(lora(tmp_path, "stopped"), lora(reference[0], "reference"))
    # a finished run is not run again
    before = time.time()
    assert "| preference (trained) |" in run(tmp_path, "stopped", checkpoint__every=100)
    assert (tmp_path / "stopped" / "checkpoints" / "LATEST").stat().st_mtime < before


def test_scores_that_fail_are_left_out_and_counted(tmp_path):
    run(
        tmp_path, "faulty", iterations=1, rewards__preference__kind="tests.faulty:build",
        rewards__preference__options="{errors: 1, missing: 1}", rewards__preference__batch_size=8,
    )  # fmt: skip
    line = metrics(tmp_path, "faulty")[1]
    assert line["reward/preference/missing"] == 2 * 2  # one of the 8 or 4 images of each branch unit
    assert line["reward/preference/mean"] > 1


@pytest.mark.slow
def test_metadata_of_a_prompt_file_reaches_a_reward_whatever_the_slices(tmp_path):
    """The reward is the `count` beside each prompt: all images of a prompt score that, and the held-out ones, too."""
    table = {"prompt": ["a red circle", "a blue square"], "metadata": ['{"count": 3}', '{"count": 5}']}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "a green star", "metadata": {"count": 7}}\n')
    for members in (1, 4):
        run(
            tmp_path, f"told-{members}", iterations=1, rollout__members_per_unit=members,
            data__train_prompts=tmp_path / "train.parquet", data__heldout_prompts=tmp_path / "heldout.jsonl",
            rewards__preference__kind="tests.faulty:build_told", rewards__preference__options="{}",
        )  # fmt: skip
        start, line = metrics(tmp_path, f"told-{members}")
        assert line["reward/preference/mean"] == 4
        assert line["reward/preference/missing"] == 0
        assert start["heldout/preference/mean"] == line["heldout/preference/mean"] == 7


def test_a_reward_that_cannot_start_ends_the_run_in_one_line(tmp_path):
    printed = run(tmp_path, "broken", status=1, rewards__preference__kind="tests.faulty:broken",
                  rewards__preference__options="{}")  # fmt: skip
    assert (
        "error: PoolStopped: reward preference-1 failed to start, 2 times in a row: ValueError: taste: no such"
        in printed
    )
    assert "Traceback" not in printed


def test_only_the_loopback_interface_is_needed():
    """With `tests/isolated`, as in `make test`, there is no other: every test here runs without a network."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.skip("not in a namespace of its own: see tests/isolated")
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)


def test_ray_job_submit_does_the_same(reference, tmp_path):
    """On a cluster that is there, with the checkout as working directory."""
    binaries = Path(sys.executable).parent  # on the path, as in an activated environment
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path), "PATH": f"{binaries}:{os.environ['PATH']}",
    }  # fmt: skip
    ray, port, dashboard = str(binaries / "ray"), 6399, 8299
    head = subprocess.Popen(
        head_command(port, f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=2",
                     "--object-store-memory=200000000"),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(head, lambda: listens(dashboard) and takes_jobs(ray, dashboard, environment))
        entry = ["python", *command(tmp_path / "runs", "submitted")[1:]]
        submit = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", ".", "--"]
        done = subprocess.run(
            [*submit, *entry], env=environment, text=True, capture_output=True, timeout=PATIENCE, check=False
        )
        assert "succeeded" in done.stdout, done.stdout + done.stderr
        same_lora(lora(tmp_path / "runs", "submitted"), lora(reference[0], "reference"))
    finally:
        kill_all(head)


def takes_jobs(ray, dashboard, environment):
    """The dashboard answers before it has an agent to run a job."""
    probe = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--", "true"]
    return not subprocess.run(probe, env=environment, capture_output=True, timeout=PATIENCE, check=False).returncode
