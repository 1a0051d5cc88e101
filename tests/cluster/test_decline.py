"""What a run does when its trained rewards fall: finer completions, or these and the learner of the best checkpoint."""

import signal

from tests.support.runs import finish, lora, metrics, run, same_lora, start, tensors, verified, wait_for_iteration

# the learning rate grows until the policy breaks: the first update is harmless, the second is not
BREAKS = {"iterations": 4, "learner__lr": 0.06, "learner__warmup": 3, "sampler__strides": "[4]", "evaluation__every": 1}


def test_a_run_that_falls_goes_back_to_its_best_learner_with_finer_completions(tmp_path):
    """With one process or two, and where it was stopped and resumed, to the same bits."""
    settings = {**BREAKS, "evaluation__on_decline": "rewind"}
    printed = run(tmp_path, "whole", **settings)
    assert "the trained rewards fell; the run goes on with stride 2 and the learner of iteration 1" in printed
    strides = [line.get("choice/stride") for line in metrics(tmp_path, "whole")]
    assert strides[:4] == [None, None, None, 2]
    checkpoints = tmp_path / "whole" / "checkpoints"
    same_lora(tensors(checkpoints / "000002" / "lora"), tensors(checkpoints / "000001" / "lora"))
    stopped = start(tmp_path, "stopped", **settings, rollout__max_actors=2)
    wait_for_iteration(stopped, tmp_path, "stopped", 2)
    stopped.send_signal(signal.SIGINT)
    finish(stopped, 130)
    run(tmp_path, "stopped", **settings)
    same_lora(lora(tmp_path, "stopped"), lora(tmp_path, "whole"))
    assert [line.get("choice/stride") for line in metrics(tmp_path, "stopped")] == strides
    for status, said in verified((tmp_path / "whole", 2), (tmp_path / "whole", 3)):
        assert status == 0, said


def test_a_run_that_falls_goes_on_with_finer_completions(tmp_path):
    printed = run(tmp_path, "finer", **BREAKS, evaluation__on_decline="finer")
    assert "the trained rewards fell; the run goes on with stride 2\n" in printed
    lines = metrics(tmp_path, "finer")
    assert [line.get("choice/stride") for line in lines[:4]] == [None, None, None, 2]
    assert lines[3]["rollout/evaluations"] > lines[2]["rollout/evaluations"]
    ((status, said),) = verified((tmp_path / "finer", 4))
    assert status == 0, said
