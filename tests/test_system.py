"""The whole system on Ray, by its command line: determinism, faults, interruption, resume."""

import signal
import time

import numpy as np
import psutil
import pytest

from tests.runs import actors_of, finish, kill_all, lora, metrics, run, start, wait_for, wait_for_iteration

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing disturbs, with two rollout actors: its output folder and what it printed."""
    output = tmp_path_factory.mktemp("reference")
    return output, run(output, "reference")


def same_lora(a, b):
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_the_documentation_promises(reference):
    output, printed = reference
    folder = output / "reference"
    lines = metrics(output, "reference")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        # T + G · Σ_i (Σ_j |path| − 1 − (J − 1)): the unique number, 2 prompts
        assert line["rollout/evaluations"] == 2 * (5 + 4 * ((4 + 3 - 1) + (2 + 2 - 1)))
        assert line["rollout/images"] == 2 * (1 + 2 * 2 * 4)
        assert line["rollout/weights_version"] == line["iteration"] - 1
        assert line["actor/ratio_initial_max_dev"] <= 1e-6
        assert line["actor/ratio_max_dev_step/1"] > 1e-6  # the second step of per_step leaves 1
        assert {"reward/preference/mean", "reward/preference/std", "eval/preference/mean"} <= line.keys()
        assert {"advantage/abs_max", "actor/loss", "actor/grad_norm", "actor/clip_fraction"} <= line.keys()
        assert {"timing_s/step", "timing_s/rollout", "timing_s/update", "timing_s/broadcast"} <= line.keys()
    assert "heldout/preference/mean" in lines[0]
    assert "heldout/preference/mean" in lines[3]
    for name in ("config.yaml", "summary.json", "samples/000003.png", "checkpoints/LATEST", "checkpoints/000003/lora"):
        assert (folder / name).exists(), name
    assert "| preference (trained) |" in printed
    assert any(np.abs(tensor).max() > 0 for name, tensor in lora(output, "reference").items() if "lora_B" in name)


def test_the_number_of_actors_changes_no_bit(reference, tmp_path):
    run(tmp_path, "one", rollout__actors=1, rewards__preference__replicas=2)
    same_lora(lora(tmp_path, "one"), lora(reference[0], "reference"))


def test_a_rollout_actor_killed_in_mid_iteration_changes_no_bit(reference, tmp_path):
    process = start(tmp_path, "killed")
    wait_for_iteration(process, tmp_path, "killed", 1)
    wait_for(process, lambda: actors_of(process, "RolloutActor.compute"))  # it is computing a unit now
    actors_of(process, "RolloutActor.compute")[0].kill()
    finish(process)
    same_lora(lora(tmp_path, "killed"), lora(reference[0], "reference"))
    assert sum(line.get("rollout/restarts", 0) for line in metrics(tmp_path, "killed")) == 1
    assert sum(line.get("rollout/units_retried", 0) for line in metrics(tmp_path, "killed")) == 1


def test_a_killed_driver_goes_on_from_its_checkpoint_to_the_same_bits(reference, tmp_path):
    process = start(tmp_path, "resumed")
    wait_for(process, lambda: (tmp_path / "resumed" / "checkpoints" / "LATEST").exists())
    kill_all(process)
    run(tmp_path, "resumed")
    same_lora(lora(tmp_path, "resumed"), lora(reference[0], "reference"))
    assert [line["iteration"] for line in metrics(tmp_path, "resumed")] == [0, 1, 2, 3]
    expected = [line["reward/preference/mean"] for line in metrics(reference[0], "reference")[1:]]
    assert [line["reward/preference/mean"] for line in metrics(tmp_path, "resumed")[1:]] == expected


def test_ctrl_c_saves_and_leaves_nothing_running_and_the_same_command_goes_on(reference, tmp_path):
    process = start(tmp_path, "stopped", checkpoint__every=100)
    wait_for_iteration(process, tmp_path, "stopped", 1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
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
