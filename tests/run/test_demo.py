"""What follows a run: its last words, and the demo, which draws what `evaluate` draws, in the browser, too."""

import shlex
import time

import numpy as np
import pytest

from g2rpo_ray.commands import demo, evaluate, train
from g2rpo_ray.commands.next_steps import next_steps
from g2rpo_ray.config import load_config
from g2rpo_ray.evaluation.adapters import read_adapters
from g2rpo_ray.runs.storage import Folder
from tests.support.demos import (
    PROMPT,
    run,  # noqa: F401  fixtures
)


@pytest.fixture(scope="module")
def studio(run):
    config = load_config(str(run / "config.yaml"))
    return demo.Studio(config, read_adapters([f"mine={run / 'lora'}"], config))


def test_the_last_words_of_a_run_work_as_they_are_printed(run):
    config = load_config(str(run / "config.yaml"))
    lines = next_steps(config, Folder(run), 40).splitlines()
    python = [line[12:] for line in lines if line.startswith(("load it:", " "))]
    assert len(python) == 3
    program = "; ".join(python)
    names: dict = {}
    exec(program, names)
    assert names["pipeline"].get_active_adapters()
    commands = {line.split(":")[0]: shlex.split(line.split(":", 1)[1]) for line in lines if "python -m" in line}
    assert commands.keys() == {"try it", "compare", "continue"}
    assert demo.make_parser().parse_args(commands["try it"][3:]).adapter == [str(run)]
    plan = evaluate.planned(evaluate.make_parser().parse_args(commands["compare"][3:]))
    assert [column.adapter.name for column in plan.columns] == ["base", config.name]
    more = train.make_parser().parse_args(commands["continue"][3:])
    assert load_config(more.config, more.set).iterations == 40 + config.iterations
    remote = next_steps(config, Folder("memory://bucket/run"), 40)
    assert "LoRA:       memory://bucket/run/lora" in remote
    assert "compare:" not in remote  # of object storage the files must be fetched first


def test_in_a_pod_the_last_words_say_how_to_get_the_files_out(run, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    said = next_steps(load_config(str(run / "config.yaml")), Folder(run), 40)
    assert f"kubectl cp g2rpo-files:{run / 'lora'} ./lora" in said
    assert 'pipeline.load_lora_weights("lora")' in said
    assert "python -m" not in said  # paths of the container, and no gradio in its image


def test_base_and_adapter_start_from_the_same_noise(studio):
    started = time.perf_counter()
    base, mine = studio.draw(PROMPT, 3, 10, 1.0)
    assert time.perf_counter() - started < 5
    assert (base.adapter, mine.adapter) == ("base", "mine")
    assert (base.picture != mine.picture).any()
    again, without = studio.draw(PROMPT, 3, 10, 0.0)
    assert (again.picture == base.picture).all()
    assert (without.picture == base.picture).all()  # the base makes all steps
    other, _ = studio.draw(PROMPT, 4, 10, 1.0)
    assert (other.picture != base.picture).any()
    assert base.scores.keys() == {"preference", "colour", "shape"}
    assert 0 < base.scores["preference"] < 1


def test_what_a_reward_cannot_judge_has_no_score(studio):
    base, _ = studio.draw("a cat", 0, 2, 1.0)
    assert np.isnan(base.scores["shape"])
    assert np.isfinite(base.scores["preference"])
    assert "- shape: **not scored**" in demo._caption(base)


@pytest.mark.parametrize(
    "bad",
    [("", 0, 4, 1.0), ("x" * 1001, 0, 4, 1.0), ("a", -1, 4, 1.0), ("a", 0, 101, 1.0), ("a", 0, 4, 2.0)],
)
def test_values_out_of_bounds_are_refused(studio, bad):
    with pytest.raises(ValueError, match="given"):
        studio.draw(*bad)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter", "/nowhere"], ["--adapter: /nowhere given", "NAME=PATH"]),
        (["--adapter", "a=/nowhere"], ["--adapter a: ", "cannot read"]),
        (["--adapter", "RUN", "--port", "0"], ["--port: 0 given"]),
        (
            ["--adapter", "RUN", "--set", "rollout.resources={GPU: 1}"],
            ["rollout.resources: GPU given", "rollout.resources={CPU: 1}"],
        ),
    ],
)
def test_invalid_input_is_one_line(run, capsys, arguments, words):
    pytest.importorskip("gradio")
    assert demo.main([str(run) if argument == "RUN" else argument for argument in arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(word in line for word in words)
