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

from g2rpo_ray.record.checkpoint import find_checkpoint
from g2rpo_ray.record.storage import Folder
from tests.runs import (
    PATIENCE,
    PREFERENCE,
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


def test_two_actors_one_and_none_give_the_same_bits(reference, alone, tmp_path):
    run(tmp_path, "one", rewards__preference__replicas=2, data__embeddings="null", **PREFERENCE)
    assert (tmp_path / "one" / "embeddings").exists()
    same_lora(lora(tmp_path, "one"), lora(reference[0], "reference"))
    same_lora(lora(tmp_path, "one"), alone(**PREFERENCE).result().lora)


def test_a_rollout_actor_killed_in_mid_iteration_changes_no_bit(bits, tmp_path):
    process = start(tmp_path, "killed")
    wait_for_iteration(process, tmp_path, "killed", 1)
    kill_at_work(process, "RolloutActor.compute")
    finish(process)
    assert recovery(tmp_path, "killed", " died: ", "rollout-1 on") < PATIENCE
    same_lora(lora(tmp_path, "killed"), bits)
    assert sum(line.get("rollout/restarts", 0) for line in metrics(tmp_path, "killed")) == 1
    assert sum(line.get("rollout/units_retried", 0) for line in metrics(tmp_path, "killed")) == 1


@pytest.mark.timeout(900)  # Ray starts four times
def test_a_run_that_is_killed_interrupted_and_told_to_end_goes_on_to_the_same_bits(alone, tmp_path):
    """The same command each time; in the middle of an iteration, and with and without a checkpoint there."""
    whole, often, never = alone(iterations=12), {"iterations": 12}, {"iterations": 12, "checkpoint__every": 100}
    process = start(tmp_path, "again", **often)
    wait_for_iteration(process, tmp_path, "again", 2)
    kill_all(process)
    kept = latest(tmp_path)
    assert kept >= 1

    process = start(tmp_path, "again", **never)
    wait_for(process, lambda: "actors are ready" in resumed(tmp_path))
    wait_for_iteration(process, tmp_path, "again", metrics(tmp_path, "again")[-1]["iteration"] + 1)
    children = descendants(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes, too
    printed = finish(process, status=130)
    assert "Traceback" not in printed
    assert "is saved: the same command goes on from there" in printed
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]
    assert latest(tmp_path) > kept

    process, kept = start(tmp_path, "again", **never), latest(tmp_path)
    wait_for_iteration(process, tmp_path, "again", kept + 1)
    process.send_signal(signal.SIGTERM)  # what `ray job stop` and a drained node send
    assert "is saved" in finish(process, status=130)
    assert find_checkpoint(Folder(tmp_path / "again")).iteration == latest(tmp_path) > kept

    run(tmp_path, "again", "--resume", "auto", **never)
    assert recovery(tmp_path, "again", "again: starting the actors", "again: actors are ready") < PATIENCE
    same_lora(lora(tmp_path, "again"), whole.result().lora)
    lines = metrics(tmp_path, "again")
    assert [line["iteration"] for line in lines] == list(range(13))
    for key in ("actor/loss", "actor/grad_norm"):
        assert [line[key] for line in lines[1:]] == [line[key] for line in whole.result().lines]
    # a finished run is not run again
    before = time.time()
    assert "| preference (trained) |" in run(tmp_path, "again", **never)
    assert (tmp_path / "again" / "checkpoints" / "LATEST").stat().st_mtime < before


def latest(output):
    return int((output / "again" / "checkpoints" / "LATEST").read_text())


def resumed(output):
    """What the run's log has of its last start."""
    return (output / "again" / "run.log").read_text().rpartition("again: starting the actors")[2]


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
            rewards__preference__kind="tests.faulty:build_told",
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


def test_ray_job_submit_does_the_same(bits, tmp_path):
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
        same_lora(lora(tmp_path / "runs", "submitted"), bits)
    finally:
        kill_all(head)


def takes_jobs(ray, dashboard, environment):
    """The dashboard answers before it has an agent to run a job."""
    probe = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--", "true"]
    return not subprocess.run(probe, env=environment, capture_output=True, timeout=PATIENCE, check=False).returncode
