"""Checkpoints, metrics, pictures and the summary: what a run leaves on disk, and what it finds there again."""

import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from g2rpo_ray.algo.tree import ANCHOR, Shape, plan_tree
from g2rpo_ray.analysis import lettering
from g2rpo_ray.analysis.grid import picture_grid
from g2rpo_ray.analysis.statistics import row
from g2rpo_ray.config import load_config
from g2rpo_ray.report.page import _result
from g2rpo_ray.rollout.metrics import rollout_metrics, signals, utilisation
from g2rpo_ray.runs.checkpoint import (
    find_checkpoint,
    finish_checkpoint,
    finished_checkpoints,
    is_evaluated,
    judge_checkpoint,
    new_checkpoint,
    read_checkpoint,
    settle_checkpoints,
)
from g2rpo_ray.runs.journal import Journal, is_finished, summarize
from g2rpo_ray.runs.reader import read_run
from g2rpo_ray.runs.start import read_origin
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.runs.timeline import write_timeline
from g2rpo_ray.runs.tracking import Tracker, json_lines, read_lines
from g2rpo_ray.types import Place, PromptRollout, Rollout, Samples, Span, UnitReport
from tests.support.kills import killed


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


@pytest.mark.parametrize("kind", ["path", "objects"])
@pytest.mark.parametrize("stopped", [False, True])
def test_whoever_is_killed_at_a_checkpoint_the_next_start_agrees_with_it(kind, stopped, tmp_path):
    """Killed before its first change to the file system, before its second ...: the run is as before or as after."""
    for iteration, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
        save(tmp_path / "template", iteration, content=str(iteration), score=score)

    def make(run):
        folder = new_checkpoint(run, 4)
        for kind_of_adapter in ("lora", "lora_ema"):
            (folder / kind_of_adapter).write("weights", b"4")
        finish_checkpoint(run, 4, folder.digests(), 2, {}, None if stopped else 1.0, stopped=stopped)

    found, untidy = [], 0
    for run in killed(tmp_path, kind, make):
        newest = find_checkpoint(run).iteration
        untidy += run.read("lora/weights").decode() != str(newest)
        assert settle_checkpoints(run, newest, 2, stopped and newest == 4) == (1 if stopped and newest == 4 else newest)
        best = 4 if newest == 4 and not stopped else 1
        assert run.read("lora/weights").decode() == str(best if stopped and newest == 4 else newest)
        assert run.exists("lora_ema/weights") == (newest == 4 and not stopped)
        assert run.read("checkpoints/LATEST").decode() == f"{newest:06d}\n"
        assert run.read("checkpoints/BEST").decode() == f"{best:06d}\n"
        kept = [f"{i:06d}" for i in sorted({best, newest - 1, newest})]
        assert finished_checkpoints(run) == kept == [name for name in (run / "checkpoints").names() if name.isdigit()]
        found.append(newest)
    assert found == sorted(found)
    assert min(found.count(3), found.count(4)) > 3
    assert untidy > 3  # else nothing was to be mended


def test_what_agrees_already_is_not_written_again(tmp_path):
    for iteration in (1, 2):
        save(tmp_path, iteration, score=0.5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert settle_checkpoints(Folder(tmp_path), 2, 2) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_of_a_run_without_checkpoint_only_what_is_half_made_goes(tmp_path):
    new_checkpoint(Folder(tmp_path), 1).write("half", b"of it")
    assert settle_checkpoints(Folder(tmp_path), 0, 2) == 0
    assert not list((tmp_path / "checkpoints").iterdir())


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
    assert "000002 is not a readable checkpoint (ValueError: lora/weights was changed)" in caplog.text
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


DAMAGE = {
    "zeros": b"\0" * 300,
    "zeros before a line": b"\0" * 300 + b'{"iteration": 1}',
    "no text": b'{"iteration": \xff\xfe}',
    "half": b'{"iteration": 1, "lo',
    "no object": b"null",
    "another object": b'{"loss": 1}',
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_is_named_and_set_aside_and_the_run_goes_on(tmp_path, damage, place):
    lines = [b'{"iteration": 0, "loss": 0.5}', b'{"iteration": 1, "loss": null}', b'{"iteration": 2}']
    sound = [json.loads(line) for number, line in enumerate(lines) if number != place]
    lines[place] = DAMAGE[damage]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config = one_granularity("iterations=3", "tracking.tensorboard=false")
    with Journal(config, tmp_path, 2) as journal:
        journal.iteration(3, measured(config, rollout([0.6, 0.6, 0.9])), {})
    after = read_lines(tmp_path / "metrics.jsonl", "iteration")
    assert after[:-1] == sound
    assert after[-1]["iteration"] == 3
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == DAMAGE[damage] + b"\n"
    warning = f"WARNING {tmp_path}/metrics.jsonl, line {place + 1} is damaged: moved to metrics.jsonl.damaged\n"
    assert warning in (tmp_path / "run.log").read_text()


def test_a_damaged_file_that_a_run_cannot_do_without_is_named(tmp_path):
    (tmp_path / "resumed_from.json").write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match=r"^/.*/resumed_from\.json is damaged, not JSON \(.*\); restore it$"):
        read_origin(Folder(tmp_path))


def test_a_resumed_run_is_compared_with_its_own_start(tmp_path):
    """Started from iteration 2 of another run: its line 2 has the first held-out scores, and the summary names both."""
    origin = {"checkpoint": "/runs/old/checkpoints/000002", "iteration": 2, "settings": {}}
    (tmp_path / "resumed_from.json").write_text(json.dumps(origin))
    config = one_granularity("iterations=3", "tracking.tensorboard=false")
    with Journal(config, tmp_path, 2) as journal:
        assert journal.first == 2
        journal.heldout(2, held_out(0.5))
        journal.heldout(3, held_out(1.0))
        journal.iteration(3, measured(config, rollout([0.5, 0.7])), {})
    assert [line["iteration"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2, 3]
    assert "before: after 2 iterations" in summarize(config, tmp_path, 3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["resumed_from"] == origin
    assert summary["heldout"]["preference"]["difference"] == pytest.approx(0.5)
    assert "resumed from /runs/old/checkpoints/000002" in (tmp_path / "run.log").read_text()


def test_an_evaluation_that_was_interrupted_counts_as_any_other(tmp_path):
    """Made at the next start: its score, its numbers in the line of its iteration, and what the panel knows."""
    config = one_granularity("iterations=5", "tracking.tensorboard=false", "evaluation.every=1")
    told = []
    with Journal(config, tmp_path, 0, [lambda i, metrics: told.append((i, set(metrics)))]) as journal:
        journal.heldout(0, held_out(0.5))
        for done in (1, 2):
            journal.iteration(done, measured(config, rollout([0.5, 0.7]), {"lora/distance": done / 4}), {})
            save(tmp_path, done)
    run = Folder(tmp_path)
    assert not is_evaluated(run, 2)
    before = read_lines(tmp_path / "metrics.jsonl")
    with Journal(config, tmp_path, 2, [lambda i, metrics: told.append((i, set(metrics)))]) as journal:
        assert (journal.distance(0), journal.distance(2)) == (0.0, 0.5)
        score = journal.heldout(2, held_out(1.0), journal.distance(2))
        assert judge_checkpoint(run, 2, score, 2, stopped=False) == 2
        journal.iteration(3, measured(config, rollout([0.5, 0.7]), {"lora/distance": 0.75}), {})
    assert is_evaluated(run, 2)
    assert run.read("checkpoints/BEST") == b"000002\n"
    after = read_lines(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in after] == [0, 1, 2, 3]
    assert after[:2] == before[:2]
    assert before[2].items() < after[2].items()
    assert after[2]["heldout/preference/mean"] == pytest.approx(1.0417, abs=1e-4)
    assert after[2]["panel/distance"] == 0.5
    assert "heldout/preference/mean" not in after[3]
    assert [(i, "heldout/preference/mean" in names) for i, names in told] == [
        (0, True), (1, False), (2, False), (2, True), (3, False),
    ]  # fmt: skip


WANDB = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")

def tell(*call):
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\\n")

class Session:
    def define_metric(self, name, step_metric):
        tell("define_metric", name, step_metric)
    def log(self, metrics):
        tell("log", metrics["iteration"], metrics["loss"])
    def finish(self):
        tell("finish")

def init(**given):
    tell("init", given["id"], given["resume"], given["project"], given["name"])
    return Session()
"""


def test_a_resumed_run_is_the_same_run_of_weights_and_biases_and_another_name_another(tmp_path, monkeypatch):
    """Against a module that writes down how it is called, in place of W&B's, which is not installed."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(None, ["tracking.wandb_project=p", "name=n", "tracking.tensorboard=false"])

    def sitting(name, done, losses):
        (tmp_path / name).mkdir(exist_ok=True)
        tracker = Tracker(config, tmp_path / name, done)
        for iteration, loss in losses.items():
            tracker.log(iteration, {"loss": loss})
        tracker.close()
        del sys.modules["wandb"]  # for good: monkeypatch would put it back, where other tests find it

    sitting("run", 0, {1: 0.1, 2: 0.2, 3: 0.3})
    sitting("run", 2, {3: 0.3})  # again, as it came after the checkpoint
    sitting("other", 2, {3: 0.4})
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    ids = [call[1] for call in calls if call[0] == "init"]
    assert ids[0] == ids[1] != ids[2]
    assert all(call[2:] == ["allow", "p", "n"] for call in calls if call[0] == "init")
    assert [call[1:] for call in calls if call[0] == "log"] == [[1, 0.1], [2, 0.2], [3, 0.3], [3, 0.3], [3, 0.4]]
    assert calls.count(["define_metric", "*", "iteration"]) == calls.count(["finish"]) == 3


@pytest.mark.parametrize(
    ("judge", "warned"), [(lambda i: 1 - i / 100, True), (lambda i: i / 100, False), (lambda i: np.nan, False)]
)
def test_a_trained_reward_that_rises_while_every_judge_falls_is_called_out(tmp_path, capsys, judge, warned):
    config = one_granularity("eval_rewards={judge: {kind: jpeg_compressibility}}", "iterations=20")
    with Journal(config, tmp_path, 0) as journal:
        for i in range(20):
            anchors = {"preference": np.array([i / 100], np.float32), "judge": np.array([judge(i)], np.float32)}
            journal.iteration(i + 1, measured(config, replace(rollout([0.1, 0.2]), anchor_scores=anchors)), {})
    assert ("may exploit" in capsys.readouterr().out) == warned


def test_where_no_anchor_is_scored_nothing_is_called_out(tmp_path, capsys):
    config = one_granularity("eval_rewards={judge: {kind: jpeg_compressibility}}", "iterations=20")
    with Journal(config, tmp_path, 0) as journal:
        for i in range(20):
            journal.iteration(i + 1, measured(config, replace(rollout([0.1, 0.2 + i]), anchor_scores={})), {})
    assert "may exploit" not in capsys.readouterr().out
    assert not [name for line in read_lines(tmp_path / "metrics.jsonl") for name in line if name.startswith("eval/")]


def test_a_grid_has_a_row_a_prompt_and_a_column_a_policy(tmp_path):
    red, blue = (np.full((32, 32, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    picture_grid(tmp_path / "grid.png", ["one", "two"], {"base": [red, blue], "after": [blue, red]})
    grid = np.array(Image.open(tmp_path / "grid.png"))
    first, second = 14 + 48, 14 + 96 + 14 + 48  # the middle of each row of tiles, 96 pixels high
    assert [tuple(grid[row, column]) for row in (first, second) for column in (48, 144)] == [
        (255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0),
    ]  # fmt: skip


def test_a_caption_is_one_line_and_covers_no_picture(tmp_path):
    """Nor does a long title reach into the next column."""
    red = np.full((96, 96, 3), (255, 0, 0), dtype=np.uint8)
    prompts = ["a sign that says\n\n\nopen\r\n\u2028now", "a\nb\nc\nd\ne\nf"]
    picture_grid(tmp_path / "grid.png", prompts, {"a name of an adapter that is long": [red] * 2, "": [red] * 2})
    grid = np.array(Image.open(tmp_path / "grid.png"))
    for top in (14, 14 + 96 + 14):
        assert (grid[top : top + 96] == (255, 0, 0)).all()
    assert (grid[:14, 96:] == 255).all()


def test_a_character_is_drawn_with_a_font_that_has_it_else_its_code_is(tmp_path, monkeypatch):
    """The fonts of the machine are here one whose only character is a black box."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    def box():
        pen = TTGlyphPen(None)
        for draw, place in zip(
            (pen.moveTo, *[pen.lineTo] * 3), ((0, 0), (0, 900), (1000, 900), (1000, 0)), strict=True
        ):
            draw(place)
        pen.closePath()
        return pen.glyph()

    def drawn(text):
        return np.array(lettering.line(text, 300, 14))[..., 0]

    (tmp_path / "none").mkdir()
    monkeypatch.setattr(font_manager, "_get_fontconfig_fonts", list)
    monkeypatch.setattr(font_manager, "X11FontDirectories", [str(tmp_path / "none")])
    caches = (lettering._font_with, lettering._installed_files)
    for cached in caches:
        cached.cache_clear()
    assert (drawn("a 中") == drawn("a \\u4e2d")).all()
    assert (drawn("a\x07") == drawn("a\\x07")).all()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "middle"])
    builder.setupCharacterMap({ord("中"): "middle"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "middle": box()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "middle": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Noto Sans Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "none" / "NotoSansTest-Regular.ttf")
    (tmp_path / "none" / "NotoSansAll-Regular.ttf").write_bytes(b"damaged")
    for cached in caches:
        cached.cache_clear()
    picture = drawn("中中 a")
    assert (picture[3:10, 3:19] < 128).all()  # two boxes, 9 pixels wide and 8 high, and a letter by the usual font
    assert (picture[:, 21:40] < 128).any()
    for cached in caches:
        cached.cache_clear()


def held_out(value):
    pictures = [np.full((32, 32, 3), int(100 * value), dtype=np.uint8)] * 2
    scores = {"preference": np.full((2, 3), value, np.float32), "colour": np.full((2, 3), np.nan, np.float32)}
    scores["preference"][0, 0] += 0.25
    return Samples(["a", "b"], scores, pictures, evaluations=60)


def one_granularity(*overrides):
    return load_config(None, ["sampler.strides=[1]", *overrides])


def measured(config, rollout, update=()):
    return {**rollout_metrics(rollout, config), **dict(update)}


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
        journal.iteration(1, measured(config, rollout([0.5, np.nan, 0.7]), {"learner/loss": 0.1}), {"pool/restarts": 1})
        journal.iteration(
            2, measured(config, rollout([9, 9, 9]), {"learner/loss": 9.0}), {}
        )  # never reached a checkpoint
    with Journal(config, tmp_path, 1) as journal:
        save(tmp_path, 2)
        assert not is_finished(config, Folder(tmp_path), 2)
        journal.heldout(2, held_out(1.0))
        journal.iteration(2, measured(config, rollout([0.6, 0.6, 0.9]), {"learner/loss": 0.2}), {"pool/restarts": 2})
    assert not is_finished(config, Folder(tmp_path), 2)
    judge_checkpoint(Folder(tmp_path), 2, 1.0, 2, stopped=False)
    assert is_finished(config, Folder(tmp_path), 2)
    assert "| preference (trained) | 0.5417 | 1.0417 | +0.5000" in summarize(config, tmp_path, 2)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert lines[1]["reward/preference/mean"] == pytest.approx(0.6)  # the missing score is in no mean
    assert lines[2]["learner/loss"] == 0.2
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


def judged(**rewards):
    """Held-out scores [P, S] by reward."""
    return Samples(["a", "b"], {name: np.array(given, np.float32) for name, given in rewards.items()}, [], 0)


def test_the_end_of_a_run_says_the_same_of_its_scores_as_evaluate_and_the_report(tmp_path):
    config = one_granularity("iterations=1")
    before, after = ([[0.1, 0.12], [0.5, 0.52]], [[0.3, 0.33], [0.51, 0.5]])
    with Journal(config, tmp_path, 0) as journal:
        journal.heldout(0, judged(preference=before))
        journal.heldout(1, judged(preference=after))
        journal.iteration(1, measured(config, rollout([0.5, 0.7])), {})
    printed = summarize(config, tmp_path, 1)
    evaluated = row(4, "a", "preference", True, *(np.array(given, np.float32) for given in (after, before)))
    low, high = evaluated.difference_low, evaluated.difference_high
    assert high - low > 2  # two prompts, which rose by .205 and -.005: Student's t has one degree of freedom
    summary = json.loads((tmp_path / "summary.json").read_text())["heldout"]["preference"]
    assert (summary["low"], summary["high"]) == (low, high)
    assert f"| {low:+.4f} to {high:+.4f} |" in printed
    (reported,) = _result(read_run(str(tmp_path))).values()
    assert (reported.low, reported.high) == (low, high)


def test_a_policy_with_a_missing_reward_has_no_score_and_a_missing_prompt_makes_none_better(tmp_path, capsys):
    taste = "rewards.taste={kind: jpeg_compressibility, weight: 0.5}"
    with Journal(one_granularity("eval_rewards={}", taste), tmp_path, 0) as journal:

        def score(done, preference, taste):
            return journal.heldout(done, judged(preference=preference, taste=taste))

        nan = np.nan
        assert score(0, [[0.2], [0.8]], [[-2.0], [-1.0]]) == pytest.approx(0.5 - 0.75)
        assert score(1, [[0.7], [0.9]], [[-2.0], [-1.0]]) == pytest.approx(0.8 - 0.75)
        assert score(2, [[0.2], [0.2]], [[nan], [nan]]) is None
        assert "no held-out scores of taste: this policy can't be the best one" in capsys.readouterr().out
        # the mean of those there is .9, but the prompt that is missing is the hard one
        assert score(3, [[nan], [0.9]], [[-2.0], [-1.0]]) == pytest.approx(0.5 + 0.1 - 0.75)
    with Journal(one_granularity("eval_rewards.taste={kind: jpeg_compressibility}"), tmp_path / "groups", 0) as journal:
        assert score(0, [[nan], [nan]], [[1.0], [3.0]]) == 2  # trained on shares of groups alone


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
