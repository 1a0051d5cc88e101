"""Checkpoints, metrics, pictures and the summary: what a run leaves on disk, and what it finds there again."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from g2rpo_ray.algo import ANCHOR, Shape, plan_tree
from g2rpo_ray.config import load_config
from g2rpo_ray.record.checkpoint import find_checkpoint, finish_checkpoint, new_checkpoint, read_checkpoint
from g2rpo_ray.record.heldout import compare, picture_grid, table
from g2rpo_ray.record.journal import Journal, is_finished, summarize
from g2rpo_ray.record.metrics import rollout_metrics, signals, utilisation
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.record.timeline import write_timeline
from g2rpo_ray.record.tracking import json_lines, read_lines
from g2rpo_ray.types import Place, PromptRollout, Rollout, Samples, Span, UnitReport


def save(path, iteration, keep=2, content="x", score=None):
    run = Folder(path)
    folder = new_checkpoint(run, iteration)
    (folder / "lora").write("weights", content.encode())
    finish_checkpoint(run, iteration, folder.digests(), keep, {}, score)


def find(path):
    return find_checkpoint(Folder(path))


def test_the_latest_checkpoint_is_found_and_the_newest_are_kept(tmp_path):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration, content=str(iteration))
    assert find(tmp_path).iteration == 3
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["000002", "000003", "LATEST"]
    assert read_checkpoint(Folder(tmp_path / "checkpoints" / "000002")).iteration == 2
    assert (tmp_path / "lora" / "weights").read_text() == "3"


def test_a_checkpoint_that_fails_half_way_changes_nothing(tmp_path):
    save(tmp_path, 1)
    new_checkpoint(Folder(tmp_path), 2).write("half", b"of it")
    assert find(tmp_path).iteration == 1
    save(tmp_path, 2)
    assert find(tmp_path).iteration == 2
    assert not (tmp_path / "checkpoints" / "000002" / "half").exists()


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    for iteration, score in enumerate([0.1, 0.9, None, 0.5, None, 0.9], start=1):
        save(tmp_path, iteration, score=score)
        if iteration == 5:
            kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
            assert kept == ["000002", "000004", "000005", "BEST", "LATEST"]
            assert (tmp_path / "checkpoints" / "BEST").read_text() == "000002\n"
    assert (tmp_path / "checkpoints" / "BEST").read_text() == "000006\n"  # of equals the newest
    assert not (tmp_path / "checkpoints" / "000002").exists()


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_text(""), lambda p: p.write_text("{"), lambda p: p.write_text("[]")]
)
def test_an_unreadable_checkpoint_is_named_in_one_line(tmp_path, damage):
    save(tmp_path, 1)
    damage(tmp_path / "checkpoints" / "000001" / "state.json")
    with pytest.raises(ValueError, match="--resume: .*000001 is not a readable checkpoint") as refusal:
        find(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog):
    for iteration in (1, 2):
        save(tmp_path, iteration)
    file = tmp_path / "checkpoints" / "000002" / "lora" / "weights"
    file.write_text("y")
    assert find(tmp_path).iteration == 1
    assert "000002 is not a readable checkpoint (ValueError: lora/weights is not as it was written)" in caplog.text
    file.unlink()
    assert find(tmp_path).iteration == 1


def test_a_damaged_checkpoint_costs_none_that_comes_after(tmp_path):
    """Its number is higher, but it is neither the newest nor one to keep."""
    for iteration in (1, 2):
        save(tmp_path, iteration)
    (tmp_path / "checkpoints" / "000002" / "lora" / "weights").write_text("y")
    save(tmp_path, 1, keep=1)
    assert find(tmp_path).iteration == 1
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "000001\n"


def test_metrics_after_the_checkpoint_of_a_killed_run_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = json_lines(path, 0)
    for iteration in range(4):
        log(iteration, {"loss": iteration / 2})
    with path.open("a") as file:
        file.write('{"iteration": 4, "lo')  # killed while writing
    log = json_lines(path, 2)
    log(3, {"loss": 9.0})
    assert read_lines(path) == [
        {"iteration": 0, "loss": 0.0},
        {"iteration": 1, "loss": 0.5},
        {"iteration": 2, "loss": 1.0},
        {"iteration": 3, "loss": 9.0},
    ]


@pytest.mark.parametrize(
    ("judge", "warned"), [(lambda i: 1 - i / 100, True), (lambda i: i / 100, False), (lambda i: np.nan, False)]
)
def test_a_trained_reward_that_rises_while_every_judge_falls_is_called_out(tmp_path, capsys, judge, warned):
    config = one_granularity("eval_rewards={judge: {kind: jpeg_compressibility}}", "iterations=20")
    with Journal(config, tmp_path, 0) as journal:
        for i in range(20):
            anchors = {"preference": np.array([i / 100], np.float32), "judge": np.array([judge(i)], np.float32)}
            journal.iteration(i + 1, replace(rollout([0.1, 0.2]), anchor_scores=anchors), {}, {})
    assert ("may exploit" in capsys.readouterr().out) == warned


def test_where_no_anchor_is_scored_nothing_is_called_out(tmp_path, capsys):
    config = one_granularity("eval_rewards={judge: {kind: jpeg_compressibility}}", "iterations=20")
    with Journal(config, tmp_path, 0) as journal:
        for i in range(20):
            journal.iteration(i + 1, replace(rollout([0.1, 0.2 + i]), anchor_scores={}), {}, {})
    assert "may exploit" not in capsys.readouterr().out
    assert not [name for line in read_lines(tmp_path / "metrics.jsonl") for name in line if name.startswith("eval/")]


def test_comparison_by_hand():
    before = np.array([[1.0, 2.0], [3.0, np.nan]], dtype=np.float32)
    after = np.array([[2.0, 2.0], [5.0, 7.0]], dtype=np.float32)
    c = compare(before, after)  # differences 1, 0, 2; the pair without a score before is left out
    assert (c.before, c.after, c.difference, c.pairs) == (2.0, 3.0, 1.0, 3)
    assert c.standard_error == pytest.approx(1 / math.sqrt(3))
    assert c.win_rate == pytest.approx(2.5 / 3)
    assert "| r (trained) | 2.0000 | 3.0000 | +1.0000 ± 0.5774 |" in table({"r": vars_of(c)}, ["r"])


def vars_of(comparison):
    return {name: getattr(comparison, name) for name in comparison.__slots__}


def test_a_grid_has_a_row_a_prompt_and_a_column_a_policy(tmp_path):
    red, blue = (np.full((32, 32, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    picture_grid(tmp_path / "grid.png", ["one", "two"], {"base": [red, blue], "after": [blue, red]})
    grid = np.array(Image.open(tmp_path / "grid.png"))
    first, second = 14 + 48, 14 + 96 + 14 + 48  # the middle of each row of tiles, 96 pixels high
    assert [tuple(grid[row, column]) for row in (first, second) for column in (48, 144)] == [
        (255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0),
    ]  # fmt: skip


def held_out(value):
    pictures = [np.full((32, 32, 3), int(100 * value), dtype=np.uint8)] * 2
    scores = {"preference": np.full((2, 3), value, np.float32), "colour": np.full((2, 3), np.nan, np.float32)}
    scores["preference"][0, 0] += 0.25
    return Samples(["a", "b"], scores, pictures, evaluations=60)


def one_granularity(*overrides):
    return load_config(None, ["sampler.strides=[1]", *overrides])


def rollout(scores):
    """Of one prompt with a child for each score."""
    tree = plan_tree(Shape(4, children=len(scores)))
    return made([prompt_rollout(tree, [scores])], {"preference": np.array([0.5], np.float32)})


def prompt_rollout(tree, scores, slot=0):
    return PromptRollout(0, slot, "a", tree, np.array(scores, np.float32), None, None, ())


def made(prompts, anchor_scores):
    reports = [
        UnitReport("trunk/0/0", "rollout-0", Place(1, "n", "a"), 0.0, 0, 10, 1, 2.0, 0.5),
        UnitReport("branch/0/0/0/0", "rollout-1", Place(2, "n", "a"), 0.0, 0, 90, 2, 3.0, 0),
    ]
    return Rollout(prompts, anchor_scores, reports, 0, 4.0, 3.5)


def test_metrics_of_an_iteration_by_hand():
    """Two prompts of three children at two granularities; an anchor's score is in no mean but that of the anchors."""
    config = load_config(None, ["rewards.taste={kind: jpeg_compressibility, weight: 2}"])
    tree = plan_tree(Shape(6, children=3, strides=(1, 2), anchors=True))
    assert tree.tag.tolist() == [ANCHOR, 0, 1, 0, 1, 0, 1]
    first = [[100, 1, 1, 2, 3, 3, 2], [100, 1, 3, 2, 2, 3, 1]]
    second = [[100, 1, 2, 2, 4, 3, np.nan], [100, 4, 4, 5, 5, 6, 6]]
    anchors = {"preference": np.array([0.5, np.nan], np.float32), "colour": np.array([1.0, 0.0], np.float32)}
    whole = made([prompt_rollout(tree, first), prompt_rollout(tree, second, 1)], anchors)
    metrics = rollout_metrics(whole, config)
    assert metrics["reward/preference/mean"] == pytest.approx((12 + 12) / 11)
    squares = sum((x - 24 / 11) ** 2 for x in (1, 1, 2, 3, 3, 2, 1, 2, 2, 4, 3))
    assert metrics["reward/preference/std"] == pytest.approx(math.sqrt(squares / 11))
    assert metrics["reward/taste/mean"] == pytest.approx((12 + 30) / 12)
    assert (metrics["eval/preference/mean"], metrics["eval/colour/mean"]) == (0.5, 0.5)
    assert "eval/taste/mean" not in metrics
    # granularity 1 has advantages (-1, 0, 1), and twice that; granularity 2 has (-1, 1, 0) + 2 (1, 0, -1) = (1, 1, -2);
    # of the second prompt the two children that have all scores agree
    found = [-9 / math.sqrt(18 * 6), 1]
    assert metrics["signal/agreement/2"] == pytest.approx(sum(found) / 2)
    # the first reward: children's means 1, 2.5, 2.5 and 1.5, 3
    assert metrics["signal/spread/0"] == pytest.approx((math.sqrt(0.75) + math.sqrt(1.125)) / 2)
    assert (metrics["rollout/evaluations"], metrics["rollout/images"], metrics["rollout/weights_version"]) == (
        100,
        3,
        0,
    )
    assert (metrics["perf/evaluations_per_s"], metrics["perf/images_per_s"]) == (25, 0.75)
    assert metrics["perf/rollout_utilisation"] == utilisation(whole.reports, 4.0) == 5 / (2 * 4)
    alone = made([prompt_rollout(plan_tree(Shape(6, children=3)), [[1, 2, 3]])], {})
    assert signals(alone.prompts, one_granularity()) == {"signal/spread/0": 1.0}  # nothing to agree with


def test_a_run_in_two_sittings_leaves_one_whole_record(tmp_path):
    config = one_granularity("iterations=2")
    with Journal(config, tmp_path, 0) as journal:
        journal.heldout(0, held_out(0.5))
        with journal.timed("rollout"):
            pass
        journal.iteration(1, rollout([0.5, np.nan, 0.7]), {"actor/loss": 0.1}, {"rollout/restarts": 1})
        journal.iteration(2, rollout([9, 9, 9]), {"actor/loss": 9.0}, {})  # never reached a checkpoint
    with Journal(config, tmp_path, 1) as journal:
        assert not is_finished(config, Folder(tmp_path), 2)
        journal.heldout(2, held_out(1.0))
        journal.iteration(2, rollout([0.6, 0.6, 0.9]), {"actor/loss": 0.2}, {"rollout/restarts": 2})
    assert is_finished(config, Folder(tmp_path), 2)
    assert "| preference (trained) | 0.5417 | 1.0417 | +0.5000" in summarize(config, tmp_path)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert lines[1]["reward/preference/mean"] == pytest.approx(0.6)  # the missing score is in no mean
    assert lines[2]["actor/loss"] == 0.2
    assert lines[2]["heldout/preference/mean"] == pytest.approx(1.0417, abs=1e-4)
    assert lines[1]["rollout/evaluations"] == 100
    assert lines[1]["perf/evaluations_per_s"] == 25
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["heldout"]["preference"]["pairs"] == 6
    assert summary["heldout"]["colour"]["pairs"] == 0
    assert (summary["evaluations"], summary["restarts"]) == (200, 3)
    assert (tmp_path / "samples" / "000002.png").exists()
    assert any((tmp_path / "tensorboard").iterdir())
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_a_timeline_tells_who_did_what_when(tmp_path):
    spans = [
        Span("rollout-0", "10.0.0.1", "weights", 100.0, 0.5, 3),
        Span("rollout-0", "10.0.0.1", "trunk/4/0", 100.5, 2.0, 3),
        Span("rollout-1", "10.0.0.2", "branch/4/0/1/0", 102.5, 6.0, 3),
        Span("reward clip-0", "10.0.0.2", "trunk/4/0", 103.0, 1.0),
        Span("run", "driver", "update", 109.0, 1.0),
    ]
    write_timeline(tmp_path, 5, spans)
    trace = json.loads((tmp_path / "timeline" / "000005.json").read_text())["traceEvents"]
    rows = {event["args"]["name"]: event["tid"] for event in trace if event["name"] == "thread_name"}
    done = [
        (event["tid"], event["name"], event["cat"], event["ts"], event["dur"]) for event in trace if event["ph"] == "X"
    ]
    assert done == [
        (rows["rollout-0"], "weights", "weights", 100e6, 0.5e6),
        (rows["rollout-0"], "trunk/4/0", "trunk", 100.5e6, 2e6),
        (rows["rollout-1"], "branch/4/0/1/0", "branch", 102.5e6, 6e6),
        (rows["reward clip-0"], "trunk/4/0", "score", 103e6, 1e6),
        (rows["run"], "update", "update", 109e6, 1e6),
    ]
    drawn = (tmp_path / "timeline" / "000005.svg").read_text()
    corners = r'M ([\d.]+) (-[\d.]+) \nL [\d.]+ -[\d.]+ \nL ([\d.]+) -[\d.]+ .*?fill: (#\w+)"'
    bars = {colour: (float(top), float(left), float(right))
            for left, top, right, colour in re.findall(corners, drawn, re.DOTALL)}  # fmt: skip
    start = bars["#e45756"][1]  # of the first span
    second = (bars["#54a24b"][2] - start) / 10
    drawn_at = {colour: [round((x - start) / second, 3) for x in ends] for colour, (_, *ends) in bars.items()}
    assert drawn_at == {
        "#e45756": [0, 0.5], "#4c78a8": [0.5, 2.5], "#72b7b2": [2.5, 8.5], "#f2a93b": [3, 4], "#54a24b": [9, 10],
    }  # fmt: skip
    order = [colour for colour, _ in sorted(bars.items(), key=lambda item: item[1])]
    assert order == ["#f2a93b", "#54a24b", "#e45756", "#4c78a8", "#72b7b2"]  # rows from the top
    rows_text = re.findall(r">((?:reward|run|rollout)[^<]*%)<", drawn)
    assert rows_text == ["reward clip-0  10%", "run  10%", "rollout-0  25%", "rollout-1  60%"]
