"""The whole system on Ray, by its command line: determinism, faults, interruption, resume."""

import base64
import hashlib
import json
import os
import shutil
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
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from g2rpo_ray.commands.train import main
from g2rpo_ray.runs.tracking import read_lines, write_lines
from tests.support.runs import (
    PATIENCE,
    PREFERENCE,
    command,
    descendants,
    finish,
    head_command,
    kill_all,
    listens,
    lora,
    metrics,
    recovery,
    run,
    same_lora,
    start,
    verified,
    wait_for,
    wait_for_iteration,
)


@pytest.mark.core
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
        assert line["learner/ratio_initial_max_dev"] == 0
        assert line["learner/ratio_max_dev_step/1"] > 1e-6  # the second step of per_step leaves 1
        assert {"reward/preference/mean", "reward/preference/std", "eval/preference/mean"} <= line.keys()
        assert {"signal/agreement/2", "signal/spread/0", "signal/spread/2"} <= line.keys()
        assert {"advantage/abs_max", "learner/loss", "learner/grad_norm", "learner/clip_fraction"} <= line.keys()
        assert {"timing_s/step", "timing_s/rollout", "timing_s/update", "timing_s/broadcast"} <= line.keys()
    assert "heldout/preference/mean" in lines[0]
    assert "heldout/preference/mean" in lines[3]
    for name in ("config.yaml", "summary.json", "samples/000003.png", "checkpoints/LATEST", "checkpoints/000003/lora"):
        assert (folder / name).exists(), name
    assert "| preference (trained) |" in printed
    assert any(np.abs(tensor).max() > 0 for name, tensor in lora(output, "reference").items() if "lora_B" in name)


@pytest.mark.core
def test_two_actors_one_and_none_give_the_same_bits(reference, alone, tmp_path):
    """Of the adapter, and on the way of each unit, score and version of the LoRA, whose digests are in audit.jsonl."""
    run(tmp_path, "one", rewards__preference__replicas=2, data__embeddings="null", **PREFERENCE)
    assert (tmp_path / "one" / "embeddings").exists()
    same_lora(lora(tmp_path, "one"), lora(reference[0], "reference"))
    one, two = (folder / "audit.jsonl" for folder in (tmp_path / "one", reference[0] / "reference"))
    assert one.read_bytes() == two.read_bytes()
    lines = read_lines(one)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert [line["weights"] for line in lines[1:]] == [line["lora"] for line in lines[:-1]]
    assert len({line["lora"] for line in lines}) == 3
    same_lora(lora(tmp_path, "one"), alone(**PREFERENCE).result().lora)


DAMAGE = {
    "sound": (0, "iteration 3: the same\n"),
    "unit": (1, "iteration 3: differs, first in unit branch/2/1/2/0, its images; prompt '"),
    "score": (
        1,
        "iteration 3: differs, first in reward preference, the image of root 0, branch step 0, child 2, λ=2: ",
    ),
    "weights": (1, "iteration 3: differs, first in the LoRA that samples: "),
    "moments": (1, "iteration 3: differs, first in the update: LoRA "),
    "checkpoint": (0, "iteration 2: the same\niteration 3: the same\n"),
    "asked elsewhere": (
        0,
        "reward preference: its recorded scores are used, because it has a runtime_env\niteration 3: the same",
    ),
    "ranks": (0, "learner.ranks: the run had 2; its update is not replayed\niteration 3: the same\n"),
}
"""What is done to a copy of a run, and how its replay ends."""


@pytest.mark.core
def test_a_replay_in_one_process_names_the_first_thing_that_is_not_as_recorded(reference, tmp_path):
    """A line of the audit was changed, or what an iteration starts from; and the replay writes nothing."""
    for damage in DAMAGE:
        folder = tmp_path / damage
        shutil.copytree(reference[0] / "reference", folder)
        harm(folder, damage)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    first, *found = verified((tmp_path / "sound", 1), *((tmp_path / damage, 3) for damage in DAMAGE))
    assert first[0] == 0, first
    for (damage, (status, said)), (ended, printed) in zip(DAMAGE.items(), found, strict=True):
        assert (ended, said in printed) == (status, True), (damage, ended, printed)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def harm(folder: Path, damage: str) -> None:
    lines, checkpoint = read_lines(folder / "audit.jsonl"), folder / "checkpoints" / "000002"
    if damage == "unit":
        lines[2]["units"]["branch/2/1/2/0"]["images"] = "0" * 16
    elif damage == "score":
        scores = np.frombuffer(base64.b64decode(lines[2]["scores"]["preference"][1]), "<f4").copy()
        scores[5] = np.nextafter(scores[5], np.float32(9))  # children 0 to 3 of step 0, each at λ = 1 and 2
        lines[2]["scores"]["preference"][1] = base64.b64encode(scores.tobytes()).decode()
    elif damage in ("weights", "moments"):
        change_tensors(checkpoint, "lora." if damage == "weights" else "exp_avg.")
    elif damage == "checkpoint":
        (checkpoint / "learner.safetensors").write_bytes(b"")
    elif damage == "asked elsewhere":
        change_settings(folder, lambda settings: settings["rewards"]["preference"].update(runtime_env={"pip": []}))
    elif damage == "ranks":
        change_settings(folder, lambda settings: settings["learner"].update(ranks=2))
    write_lines(folder / "audit.jsonl", lines)


def change_tensors(checkpoint: Path, kind: str) -> None:
    """In the checkpoint and in its state, so that it counts as sound."""
    file = checkpoint / "learner.safetensors"
    with safe_open(file, "numpy") as stored:
        header, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    save_file({name: 1.5 * t if name.startswith(kind) else t for name, t in tensors.items()}, file, header)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))


def change_settings(folder: Path, change) -> None:
    """Of the run and of its checkpoints."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    change(settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for file in folder.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text())
        change(state["settings"])
        file.write_text(json.dumps(state))


@pytest.mark.timeout(900)  # Ray starts three times
def test_a_run_that_is_killed_and_interrupted_goes_on_to_the_same_bits(alone, tmp_path):
    """The same command each time; in the middle of an iteration, of an evaluation, with and without a checkpoint."""
    whole, often = alone(iterations=12), {"iterations": 12, "evaluation__every": 6, "evaluation__seeds": 4}
    never = {**often, "checkpoint__every": 100}
    process = start(tmp_path, "again", **often)
    wait_for_iteration(process, tmp_path, "again", 2)
    kill_all(process)
    kept = latest(tmp_path)
    assert kept >= 1

    process = start(tmp_path, "again", **never)
    wait_for(process, lambda: starts(tmp_path) == 2 and "actors are ready" in resumed(tmp_path))
    wait_for(process, lambda: "sample/" in resumed(tmp_path))  # a first one of the held-out prompts after 6 iterations
    children = descendants(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes, too
    printed = finish(process, status=130)
    assert "Traceback" not in printed
    assert "is saved. Run the same command to resume" in printed
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]
    assert latest(tmp_path) == 6 > kept
    assert not heldout_scores(tmp_path, 6)

    run(tmp_path, "again", "--resume", "auto", **never)
    assert recovery(tmp_path, "again", "again: starting the actors", "again: actors are ready") < PATIENCE
    same_lora(lora(tmp_path, "again"), whole.result().lora)
    lines = metrics(tmp_path, "again")
    assert [line["iteration"] for line in lines] == list(range(13))
    assert [line["iteration"] for line in read_lines(tmp_path / "again" / "audit.jsonl")] == list(range(1, 13))
    for key in ("learner/loss", "learner/grad_norm"):
        assert [line[key] for line in lines[1:]] == [line[key] for line in whole.result().lines]
    # the evaluation that was interrupted is made, and counts as any other
    assert [i for i in range(13) if heldout_scores(tmp_path, i)] == [0, 6, 12]
    record = heldout_scores(tmp_path, 6)
    assert record["panel"]["distance"] == lines[6]["lora/distance"]
    means = {i: np.mean(heldout_scores(tmp_path, i)["scores"]["preference"], dtype=np.float32) for i in (6, 12)}
    assert lines[6]["heldout/preference/mean"] == pytest.approx(means[6], rel=1e-6)
    assert int((tmp_path / "again" / "checkpoints" / "BEST").read_text()) == max(means, key=lambda i: (means[i], i))
    # a finished run is not run again
    before = time.time()
    assert "| preference (trained) |" in run(tmp_path, "again", **never)
    assert (tmp_path / "again" / "checkpoints" / "LATEST").stat().st_mtime < before


def latest(output):
    return int((output / "again" / "checkpoints" / "LATEST").read_text())


def heldout_scores(output, iteration):
    """What an evaluation left, None where it was not made."""
    file = output / "again" / "samples" / f"{iteration:06d}.json"
    return json.loads(file.read_text()) if file.exists() else None


def starts(output):
    return (output / "again" / "run.log").read_text().count("again: starting the actors")


def resumed(output):
    """What the run's log has of its last start."""
    return (output / "again" / "run.log").read_text().rpartition("again: starting the actors")[2]


@pytest.mark.core
def test_a_finished_run_that_was_killed_while_it_wrote_its_end_is_put_in_order(reference, tmp_path, capsys):
    """The adapter of before, no report, a line of zeros, a checkpoint that is half deleted: without any actor."""
    output, folder = reference[0], tmp_path / "reference"
    shutil.copytree(output / "reference", folder)
    shutil.copytree(output / "reference" / "checkpoints" / "000001" / "lora", folder / "lora", dirs_exist_ok=True)
    for file in ("report.html", "summary.json", "checkpoints/LATEST", "checkpoints/000001/state.json"):
        (folder / file).unlink()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 700 + b"\n")
    settings = {"rollout__max_actors": 2, **PREFERENCE}
    assert main(command(tmp_path, "reference", **settings)[3:]) == 0
    assert "reference is finished" in capsys.readouterr().out
    same_lora(lora(tmp_path, "reference"), lora(output, "reference"))
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 3
    assert "metrics.jsonl, line 5 is damaged" in (folder / "report.html").read_text()
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["000002", "000003", "BEST", "LATEST"]


@pytest.mark.slow
def test_a_rollout_actor_and_a_rank_whose_devices_fail_change_no_bit(bits, tmp_path):
    """A CUDA error that sticks: in their processes every later call would fail, too."""

    def breaks(who, after):
        # Ray takes a hook for all of a job's processes only; this is its variable. It imports the hook
        # before it sets the driver's import path.
        hook = {
            "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "tests.support.faulty.break_device",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        return json.dumps({"env_vars": {"BREAKS": str(tmp_path / who), "BREAKS_AFTER": str(after), **hook}})

    run(tmp_path, "broken", rollout__runtime_env=breaks("rollout", 500), learner__runtime_env=breaks("learner", 200))
    assert (tmp_path / "rollout").exists()
    assert (tmp_path / "learner").exists()
    log = (tmp_path / "broken" / "run.log").read_text()
    assert "died: AcceleratorError: CUDA error: an illegal memory access" in log
    assert "the learner is ready again" in log
    same_lora(lora(tmp_path, "broken"), bits)


@pytest.mark.slow
def test_scores_that_fail_are_left_out_and_counted(tmp_path):
    run(
        tmp_path, "faulty", iterations=1, rewards__preference__kind="tests.support.faulty:build",
        rewards__preference__options="{errors: 1, missing: 1}", rewards__preference__batch_size=8,
    )  # fmt: skip
    line = metrics(tmp_path, "faulty")[1]
    assert line["reward/preference/missing"] == 2 * 2  # one of the 8 or 4 images of each branch unit
    assert line["reward/preference/mean"] > 1


@pytest.mark.slow
def test_metadata_of_a_prompt_file_reaches_a_reward(tmp_path):
    """The reward is the `count` beside each prompt: all images of a prompt score that, and the held-out ones, too."""
    table = {"prompt": ["a red circle", "a blue square"], "metadata": ['{"count": 3}', '{"count": 5}']}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "a green star", "metadata": {"count": 7}}\n')
    run(
        tmp_path, "told", iterations=1, rollout__members_per_unit=1, data__train_prompts=tmp_path / "train.parquet",
        data__heldout_prompts=tmp_path / "heldout.jsonl", rewards__preference__kind="tests.support.faulty:build_told",
    )  # fmt: skip
    start, line = metrics(tmp_path, "told")
    assert line["reward/preference/mean"] == 4
    assert line["reward/preference/missing"] == 0
    assert start["heldout/preference/mean"] == line["heldout/preference/mean"] == 7


def test_a_reward_that_cannot_start_ends_the_run_in_one_line(tmp_path):
    printed = run(tmp_path, "broken", status=1, rewards__preference__kind="tests.support.faulty:broken",
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
