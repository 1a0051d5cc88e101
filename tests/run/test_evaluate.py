"""Evaluation: the statistics, what may not be mixed, hybrid sampling, and real small evaluations on Ray."""

import csv
import json
import math
import shutil

import numpy as np
import pytest

from g2rpo_ray.analysis.statistics import compare, compare_all, interval, row
from g2rpo_ray.analysis.tables import before_and_after, to_csv, to_markdown
from g2rpo_ray.commands.evaluate import main, make_parser, planned
from g2rpo_ray.config import load_config
from g2rpo_ray.evaluation.scores import ScoreBook
from g2rpo_ray.models import FlowModel
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.study.statistics import crossed
from g2rpo_ray.types import Cell, SampleUnit
from tests.support.evaluations import (
    PROMPTS,
    files,  # noqa: F401  fixtures
    random_state,
)

NAN = math.nan


def test_an_interval_by_hand():
    # the prompts' means are 2, 4 and 9; the last prompt has no score; sd √13, t(2) = 4.302653
    scores = np.array([[1, 3], [4, NAN], [8, 10], [NAN, NAN]], dtype=np.float32)
    found = interval(scores)
    assert found.mean == 5
    assert found.high - 5 == pytest.approx(5 - found.low) == pytest.approx(4.302653 * math.sqrt(13) / math.sqrt(3))
    one = interval(scores[:1])
    assert one.mean == 2
    assert math.isnan(one.low)
    assert math.isnan(interval(scores[3:]).mean)


def test_a_row_by_hand():
    base = np.array([[1, 2], [3, 4], [5, NAN]], dtype=np.float32)
    scores = np.array([[2, 2], [3, 6], [4, 9]], dtype=np.float32)
    # differences 1, 0 | 0, 2 | -1: prompts 0.5, 1, -1, mean 1/6, sd √(13/12)
    found = row(10, "new", "taste", True, scores, base)
    assert found.difference == pytest.approx(1 / 6)
    assert found.difference_high - found.difference == pytest.approx(4.302653 * math.sqrt(13 / 12) / math.sqrt(3))
    assert found.win_rate == pytest.approx((2 + 0.5 * 2) / 5)
    assert (found.pairs, found.scores, found.missing) == (5, 6, 0)
    alone = row(10, "base", "taste", True, base, None)
    assert (alone.mean, alone.pairs, alone.missing) == (pytest.approx((1.5 + 3.5 + 5) / 3), 0, 1)
    lines = list(csv.DictReader(to_csv([alone, found]).splitlines()))
    assert lines[0]["difference"] == ""
    assert float(lines[1]["win_rate"]) == pytest.approx(0.6)
    text = to_markdown([alone, found])
    assert "| adapter | taste (trained) |" in text
    assert "| new | taste | +0.1667 | -2.4189 to +2.7522 | 60.0% | 5 |" in text


def test_a_policy_before_and_after_by_hand():
    """The scores of a prompt are alike: four more seeds of each of them sharpen nothing."""
    before = np.array([[1.0, 2.0], [3.0, NAN]], dtype=np.float32)
    after = np.array([[2.0, 2.0], [5.0, 7.0]], dtype=np.float32)
    found = compare(before, after)  # differences 1, 0 | 2, so prompts 0.5 and 2
    assert (found.before, found.after, found.difference, found.pairs) == (2.25, 3.5, 1.25, 3)
    assert found.high - 1.25 == pytest.approx(1.25 - found.low) == pytest.approx(12.7062 * 0.75, rel=1e-5)
    assert found.win_rate == pytest.approx(2.5 / 3)
    text = before_and_after({"taste": found}, ["taste"])
    assert "| taste (trained) | 2.2500 | 3.5000 | +1.2500 | -8.2797 to +10.7797 | 83% | 3 |" in text
    # the same of one run of a study, which resamples prompts
    means = np.array([[interval(row[None]).mean for row in after - before]])
    of_study = crossed(means, one_policy=True)
    assert (of_study.mean, of_study.low, of_study.high) == pytest.approx((1.25, found.low, found.high))
    again = compare(np.tile(before, 5), np.tile(after, 5))
    assert (again.low, again.high) == pytest.approx((found.low, found.high))


def test_one_prompt_has_no_interval_and_says_so():
    base, scores = np.array([[1.0, 3.0]], np.float32), np.array([[2.0, 3.0]], np.float32)
    text = to_markdown([row(10, "base", "taste", True, base, None), row(10, "new", "taste", True, scores, base)])
    assert "| base | 2.0000 (one alone: no error) |" in text
    assert "| new | taste | +0.5000 | one prompt gives none | 75.0% | 2 |" in text
    one, none = scores[:, :1], np.full((1, 1), NAN, np.float32)
    found = compare_all({"taste": base[:, :1], "other": none}, {"taste": one, "other": none})
    of_pairs = before_and_after(found, ["taste"])
    assert "| taste (trained) | 1.0000 | 2.0000 | +1.0000 | one prompt gives none | 100% | 1 |" in of_pairs
    assert "| other | – | – | – | – | – | 0 |" in of_pairs
    assert "nan" not in text + of_pairs


def test_scores_are_kept_and_a_line_that_a_kill_cut_off_is_not(tmp_path):
    cells = [Cell("key", 1, SampleUnit(prompt, (0, 1), 10), shown=prompt == "a") for prompt in "ab"]
    book = ScoreBook(tmp_path)
    picture = np.full((4, 4, 3), 7, dtype=np.uint8)
    book.add(cells[0], {"taste": np.array([0.1, NAN], np.float32)}, picture)
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"key": "key", "steps": 10, "pro')
    ScoreBook(tmp_path).add(cells[1], {"taste": np.array([1, 2], np.float32)}, None)
    book = ScoreBook(tmp_path)
    assert [book.has(cell) for cell in cells] == [True, True]
    np.testing.assert_array_equal(book.scores(cells[0], "taste"), np.array([0.1, NAN], np.float32))
    assert (book.picture(cells[0]) == picture).all()
    assert not book.has(Cell("another adapter", 1, cells[0].unit, shown=False))
    assert not book.has(Cell("key", 1, cells[1].unit, shown=True))  # its picture was not asked for then


def test_a_damaged_line_costs_the_scores_of_its_cell_alone(tmp_path):
    cells = [Cell("key", 1, SampleUnit(prompt, (0,), 10), shown=False) for prompt in "abc"]
    book = ScoreBook(tmp_path)
    for cell in cells:
        book.add(cell, {"taste": np.array([0.5], np.float32)}, None)
    first, second, third = (tmp_path / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_bytes(first + bytes(len(second)) + third + third)
    book = ScoreBook(tmp_path)
    assert [book.has(cell) for cell in cells] == [True, False, True]
    assert (tmp_path / "scores.jsonl.damaged").read_bytes() == bytes(len(second)) + third


def plan_of(files, *given):
    return planned(make_parser().parse_args(["--prompts", str(files / "prompts.txt"), *given]))


def test_scores_of_a_changed_adapter_or_setting_are_not_taken(files, tmp_path):
    shutil.copytree(files / "lora", tmp_path / "lora")
    given = ["--adapter", f"new={tmp_path / 'lora'}"]
    base, new = (column.key for column in plan_of(files, *given).columns)
    assert [column.key for column in plan_of(files, *given).columns] == [base, new]
    hybrid = plan_of(files, *given, "--hybrid", "0.5").columns
    assert hybrid[0].key == base
    assert hybrid[1].key != new
    shutil.copytree(files / "other", tmp_path / "lora", dirs_exist_ok=True)
    changed = plan_of(files, *given).columns
    assert changed[0].key == base
    assert len({new, hybrid[1].key, changed[1].key}) == 3
    for setting in (["--seeds", "3"], ["--set", "model.guidance_scale=1"], ["--set", "eval_rewards={}"]):
        assert not {base, new} & {column.key for column in plan_of(files, *given, *setting).columns}


def test_scores_of_a_prompt_with_other_metadata_are_not_taken(files, tmp_path):
    def keys(metadata):
        lines = [{"prompt": "a red circle", "metadata": metadata}, {"prompt": "a blue square"}]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        plan = plan_of(files, "--prompts", str(tmp_path / "prompts.jsonl"))
        (block,) = plan.blocks()
        assert [cell.unit.prompt for cell in block] == ["a red circle", "a blue square"]
        return [cell.key for cell in block]

    (column,) = plan_of(files).columns
    first, second, none = keys({"count": 1}), keys({"count": 2}), keys(None)
    assert none == [column.key] * 2  # as it was before there was metadata
    assert first[1] == second[1] == column.key
    assert len({first[0], second[0], none[0]}) == 3


def test_hybrid_sampling_is_the_adapter_then_the_base():
    config = load_config()
    (embedding,) = FlowModel.load(config.model, "cpu", text_encoders=True).encode(PROMPTS[:1])
    sampler = Sampler(config)
    state = random_state(config)

    def sample(state, share, steps=6):
        sampler.load_weights(state)
        before = sampler.evaluations
        images = sampler.sample(SampleUnit(PROMPTS[0], (0, 1), steps, share), embedding)
        assert sampler.evaluations - before == 2 * steps
        return images

    base = sample({name: np.zeros_like(array) for name, array in state.items()}, 1.0)
    adapter = sample(state, 1.0)
    assert (sample(state, 0.0) == base).all()
    assert (sample(state, 0.08) == base).all()  # of 6 steps, that is none
    assert (sample(state, 1.0) == adapter).all()
    half = sample(state, 0.5)
    assert (half != base).any()
    assert (half != adapter).any()
    assert (base != adapter).any()
    assert (sample(state, 1.0, steps=config.sampler.steps) != adapter).any()


CASES = {
    "no such option": (["--adaptor", "x=y"], ["unrecognized arguments: --adaptor"]),
    "steps that are no number": (["--steps", "ten"], ["--steps: invalid int value: 'ten'"]),
    "no step": (["--steps", "10", "0"], ["--steps: 0 given; must be a whole number from 1 to 1000"]),
    "steps that no machine has time for": (["--steps", "10", "1000000000"], ["--steps: 1000000000 given", "to 1000"]),
    "more seeds than fit": (["--seeds", "100000000000"], ["--seeds: 100000000000 given", "to 1024"]),
    "more pictures than fit": (["--grid", "1000000"], ["--grid: 1000000 given", "to 1024"]),
    "no seed": (["--seeds", "0"], ["--seeds: 0 given; must be a whole number from 1 to 1024"]),
    "hybrid beyond 1": (["--hybrid", "1.5"], ["--hybrid: 1.5 given", "from 0 to 1"]),
    "hybrid not a number": (["--hybrid", "nan"], ["--hybrid: nan given"]),
    "unknown key": (["--set", "lora.rnak=4"], ["lora.rnak: unknown key"]),
    "missing prompts": (["--prompts", "FILES/none.txt"], ["data.heldout_prompts: cannot read", "none.txt"]),
    "adapter without a name": (["--adapter", "FILES/lora"], ["--adapter: ", "expected NAME=PATH"]),
    "adapter called base": (["--adapter", "base=FILES/lora"], ["--adapter: the name 'base' is used twice"]),
    "one name twice": (["--adapter", "a=FILES/lora", "a=FILES/other"], ["--adapter: the name 'a' is used twice"]),
    "no adapter there": (["--adapter", "a=FILES/none"], ["--adapter a: ", "cannot read"]),
    "another rank": (["--adapter", "a=FILES/rank"], ["--adapter a: ", "has rank 4", "give --set lora.rank=4"]),
    "metadata that is a list": (["--adapter", "a=FILES/list.safetensors"], ["--adapter a: ", "metadata", "is '[1]'"]),
    "other targets": (["--adapter", "a=FILES/targets"], ["--adapter a: ", "lora.targets", "missing"]),
    "output is a file": (["--output", "FILES/prompts.txt"], ["--output: ", "is not a folder"]),
    "damaged scores": (["--output", "FILES/damaged"], ["--output: cannot read", "scores.jsonl", "delete it"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_status_2(case, files, tmp_path, capsys):
    wrong, parts = CASES[case]
    given = [argument.replace("FILES", str(files)) for argument in wrong]
    assert main(["--set", f"output={tmp_path}", *given]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1, printed
    for part in parts:
        assert part in printed
    assert not list(tmp_path.iterdir())
