"""`auto` on Ray: what a run picks depends on its record alone."""

import signal

import pytest

from g2rpo_ray.runs.checkpoint import find_checkpoint
from g2rpo_ray.runs.storage import Folder
from tests.support.runs import finish, lora, metrics, run, same_lora, start, wait_for_iteration

CHOOSING = {
    "iterations": 5, "sampler__strides": "auto", "sampler__branch_steps": "auto", "sampler__auto__every": 2,
    "sampler__auto__prompts": 3, "sampler__auto__steps": 1,
    "learner__lr": 0.01, "data__prompts_per_iteration": 3,
}  # fmt: skip


@pytest.mark.cluster
def test_a_run_picks_what_its_record_says_on_any_number_of_actors_after_a_stop(alone, tmp_path):
    whole, settings = alone(**CHOOSING), {"rollout__max_actors": 2, **CHOOSING}
    process = start(tmp_path, "two", **settings)
    wait_for_iteration(process, tmp_path, "two", 2)
    process.send_signal(signal.SIGTERM)
    assert "is saved" in finish(process, status=130)
    kept = find_checkpoint(Folder(tmp_path / "two")).iteration
    assert kept == int((tmp_path / "two" / "checkpoints" / "LATEST").read_text()) >= 1
    assert len(metrics(tmp_path, "two")) < 6
    run(tmp_path, "two", **settings)
    same_lora(lora(tmp_path, "two"), whole.result().lora)
    lines = metrics(tmp_path, "two")[1:]
    assert [line.get("probe/prompts") for line in lines] == [3, None, 6, None, 9]  # those before the stop, too
    assert "auto, from iteration 2 on, by 3 probed prompts: λ=" in (tmp_path / "two" / "run.log").read_text()
    for line, alike in zip(lines, whole.result().lines, strict=True):
        chosen, alike_chosen = (
            {name: value for name, value in of.items() if name.startswith(("choice/", "probe/")) and value == value}
            for of in ({name: value for name, value in line.items() if value is not None}, alike)
        )  # a NaN is null in the file
        assert chosen == alike_chosen
