"""Studies: refused in a line, counted by hand, interrupted and gone on with, tables from the record alone."""

import ctypes
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from g2rpo_ray.commands.study import main, waves, write
from g2rpo_ray.config import load_config
from g2rpo_ray.runs.lease import Lease
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.study import runner
from g2rpo_ray.study.plan import Plan
from g2rpo_ray.study.record import FILE, Record
from g2rpo_ray.study.rows import Results
from g2rpo_ray.study.runner import Workers
from g2rpo_ray.study.schema import read_study
from g2rpo_ray.study.statistics import crossed, crossing, over_seeds
from tests.support.studies import STUDY, TREE, plan_of, study_file

ROOT = Path(__file__).parents[2]


def test_a_learning_rate_that_falls_is_0_at_the_end_of_the_budget(tmp_path):
    plan = plan_of(tmp_path, set=STUDY["set"] | {"learner": {"lr_schedule": "linear"}})
    for case in [*plan.runs("one", "tree", 1e-4), *plan.tuning("one", "tree")]:
        assert case.config.learner.lr_iterations == case.config.iterations
    assert plan.runs("one", "tree", 1e-4)[0].config.iterations > plan.tuning("one", "tree")[0].config.iterations


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"budgets": 5}, "budgets: unknown key; did you mean budget?"),
        ({"budget": 0}, "budget: 0 given; input should be greater than 0"),
        ({"tuning": {"seed": 1, "lr": [1e-3, 2e-3]}}, "tuning.seed: 1 is in tables.one.seeds; give another"),
        ({"tuning": {"seed": 9, "rate": 1, "lr": [1, 0.1]}}, "tuning.rate: unknown key; allowed are seed, share, lr"),
        ({"budget": 20}, "budget: 10 for a run of one, tree; an iteration costs 20"),
        ({"name": "a/b"}, "name: 'a/b' given; string should match pattern"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_a_line(changes, line, tmp_path, capsys):
    assert main([str(study_file(tmp_path, **changes)), "--check", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"against": ["nobody"]}, "tables.one.against: nobody given; allowed are base, tree"),
        ({"seeds": [0]}, "tables.one.seeds: [0] given; tuple should have at least 2 items"),
        ({"tuned_as": "nobody"}, "tables.one.tuned_as: nobody given; must be a variant"),
        ({"variants": {"tree": {"sampler": {"step": 3}}}}, "tables.one.variants.tree: sampler.step: unknown key"),
        (
            {"variants": {"tree": TREE, "short": {**TREE, "evaluation": {"seeds": 2}}}},
            "tables.one.variants.short: scores cannot be compared; rewards, prompts, steps and sampling",
        ),
        ({"sides": 1}, "tables.one.sides: unknown key; did you mean"),
    ],
)
def test_so_is_a_table(table, line, tmp_path, capsys):
    tables = {"one": {"title": "t", "seeds": [0, 1], "variants": {"tree": {}}, **table}}
    assert main([str(study_file(tmp_path, tables=tables)), "--check", "--output", str(tmp_path / "out")]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("[1, 2]", "list"), ("5", "int")])
def test_so_is_a_file_of_something_else(text, kind, tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    assert main([str(file), "--check"]) == 2
    told = f"error: {file} must hold a mapping of settings, not {kind}; see configs/studies\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("given", ["--jobs=0", "--jobs=100000"])
def test_so_is_an_option_s_number(given, tmp_path, capsys):
    assert main([str(study_file(tmp_path)), "--check", given, "--output", str(tmp_path / "out")]) == 2
    option, _, value = given.partition("=")
    assert capsys.readouterr().err.startswith(f"error: {option}: {value} given; must be ")


def test_the_budget_decides_the_iterations_by_what_they_will_cost(tmp_path):
    plan = plan_of(tmp_path)
    # a prompt: a trunk's step, two children of three more; the learner's state counts 3
    assert plan.runs("one", "tree", None)[0].config.iterations == 120 // (2 * (1 + 2 * 3 + 3))
    # chains: the first step is shared, then three each; of each child one state is drawn, maybe that of the first step
    chains = plan.runs("one", "chains", None)[0].config
    assert 120 // (2 * 7 + 2 * 3 * 2) <= chains.iterations <= 120 // (2 * 7 + 2 * 3)
    assert chains.learner.lr == 3e-4
    grid = plan.tuning("one", "tree")
    assert [(case.config.seed, case.config.learner.lr, case.config.iterations) for case in grid] == [
        (9, 1e-4, 3), (9, 2e-4, 3),
    ]  # fmt: skip
    assert not plan.tuning("one", "chains")  # its rate is given
    assert not plan.tuning("ablation", "eta .7")
    assert plan.tuned_as("ablation", "eta .7") == ("one", "tree")


def test_the_same_settings_in_two_tables_are_one_run_and_others_are_not(tmp_path):
    plan = plan_of(tmp_path)
    keys = [[case.key for case in plan.runs(*place, 1e-4)] for place in (("one", "tree"), ("ablation", "eta .7"))]
    assert keys[0] == keys[1]
    assert len({*keys[0], *(case.key for case in plan.runs("one", "tree", 2e-4))}) == 4
    more = plan_of(tmp_path, set={**STUDY["set"], "tracking": {"tensorboard": False}, "output": str(tmp_path)})
    assert [case.key for case in more.runs("one", "tree", 1e-4)] == keys[0]  # changes no bit
    assert plan.base("one").key == plan.base("ablation").key == plan.runs("one", "tree", 1e-4)[0].base


def test_the_check_tells_the_hours_of_all_runs(tmp_path, capsys):
    given = [str(study_file(tmp_path)), "--check", "--devices", "1tflops:2@10", "--output", str(tmp_path / "out")]
    assert main(given) == 0
    each = 3.0769152e-05  # 10^12 operations, counted from the quickstart's files
    # four runs of 120 and two of the grid of 60; two looks and one, at 12 prompts by 4 steps each
    least, most = (each * (600 + 12 * 4 * 10) / share / 3600 for share in (0.55, 0.2))
    printed = capsys.readouterr().out
    assert f"3.08e-05e12 operations: {least:.2g} to {most:.2g} device-hours of a 1tflops" in printed
    assert f"money {10 * least:.2g} to {10 * most:.2g}; {least / 2:.2g} to {most / 2:.2g} hours of 2" in printed


def test_a_second_process_on_the_same_record_is_refused_and_may_read_it(tmp_path, capsys):
    given = [str(study_file(tmp_path)), "--output", str(tmp_path / "out")]
    with Lease(Folder(tmp_path / "out")):
        assert main(given) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / 'out'} is in use by process ")
        assert said.count("\n") == 1
        assert main([*given, "--table"]) == main([*given, "--check"]) == 0
    assert not (tmp_path / "out" / "lease.json").exists()


def line_of(case, scores, costs=(50.0, 100.0), **more):
    """A finished run's line, its curve ending at the mean of the scores, after half of the way from .4."""
    means = {name: float(np.mean(of)) for name, of in scores.items()}
    half = {name: (0.4 + mean) / 2 for name, mean in means.items()}
    curve = [{"iteration": n + 1, "cost": cost, "seconds": cost / 10, "means": (half, means)[n]}
             for n, cost in enumerate(costs)]  # fmt: skip
    if case.kind == "base":
        curve = [{"iteration": 0, "cost": 0, "seconds": 0, "means": means}]
    return {"key": case.key, "kind": case.kind, "seed": case.config.seed, "curve": curve, "scores": scores,
            "evaluations": 80, "states": 6, **more}  # fmt: skip


def by_hand(folder: Path, **changes) -> tuple[Plan, Record]:
    """A record of a study whose scores are made up: two prompts."""
    plan, record = plan_of(folder, **changes), Record(folder / "out")
    record.add(line_of(plan.base("one"), {"preference": [0.3, 0.5], "shape": [0.0, 1.0]}))
    for case, score in zip(plan.tuning("one", "tree"), (0.5, 0.7), strict=True):
        record.add(line_of(case, {"preference": [score, score], "shape": [1.0, 1.0]}))
    scores = {"tree": [[0.6, 0.8], [0.7, 0.9]], "chains": [[0.5, 0.5], [0.5, None]]}
    for variant, lr in (("tree", 2e-4), ("chains", None)):
        for case, of in zip(plan.runs("one", variant, lr), scores[variant], strict=True):
            means = [value for value in of if value is not None]
            line = line_of(case, {"preference": means, "shape": [1.0, 1.0]})
            record.add({**line, "scores": {"preference": of, "shape": [1.0, 1.0]}})
    return plan, record


def test_a_damaged_line_of_the_record_is_named_and_its_run_is_made_again(tmp_path, caplog):
    record = Record(tmp_path)
    for key in "abc":
        record.add({"key": key})
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes().replace(b'{"key": "b"}', b"\0" * 12))
    record = Record(tmp_path)
    assert list(record.lines) == ["a", "c"]
    assert f"{tmp_path / FILE}, line 2 is damaged and left out" in caplog.text
    record.add({"key": "b"})
    assert list(Record(tmp_path).lines) == ["a", "c", "b"]


def test_the_table_is_the_record_s_and_its_numbers_are_those_of_a_calculation_by_hand(tmp_path):
    plan, record = by_hand(tmp_path)
    found = Results(plan, record.lines).rows()
    rows = {(row.table, row.variant, row.measure, row.of, row.against): row for row in found}
    tree = rows["one", "tree", "score", "preference", ""]
    # seeds .7, .8: variance of their mean .0025, 1 degree of freedom; prompts .65, .85: .01, 1; together .0125, and
    # .0125² / (.0025² + .01²) = 1.4706 degrees, at which Student's t, its density integrated, is 6.1881
    assert tree.mean == pytest.approx(0.75)
    assert tree.high - tree.mean == pytest.approx(6.1881 * 0.0125**0.5, rel=1e-3)
    base = rows["one", "base", "score", "preference", ""]
    assert (base.mean, base.high - base.mean) == pytest.approx((0.4, 12.7062 * 0.1), rel=1e-4)  # prompts alone
    paired = rows["one", "tree", "difference", "preference", "chains"]
    assert paired.mean == pytest.approx(np.mean([0.1, 0.3, 0.2]))  # without the pair that lacks a score
    early = rows["one", "tree", "early", "preference", "chains"]
    # at a cost of 30, tree has come from .4 to .49 and .52; chains end at .5
    assert early.mean == pytest.approx(0.005)
    assert early.high - early.mean == pytest.approx(12.7062 * 0.03 / 2, rel=1e-4)
    assert ("one", "tree", "early", "preference", "base") not in rows
    reach = rows["one", "tree", "cost_to", "0.5", ""]
    # curves .4, .55, .7 and .4, .6, .8 at costs 0, 50, 100
    assert reach.mean == pytest.approx((50 * 0.1 / 0.15 + 50 * 0.1 / 0.2) / 2)
    assert rows["one", "chains", "cost_to", "0.5", ""].mean == pytest.approx(100)
    assert ("ablation", "eta .7", "score", "preference", "") in rows  # the same runs
    markdown = write(plan, record)
    assert "| tree | 0.0002 (end of the grid) | " in markdown
    assert "| tree | 0.7500 ± 0.6919 |" in markdown
    assert "| at 25% of the budget, to chains at its end | preference | shape |" in markdown
    assert "Seeds are missing" not in markdown
    table = json.loads((record.folder / "table.json").read_text())
    assert table["runs"]["one"]["tree"]["seeds"] == [0, 1]
    assert {path.name for path in record.folder.glob("*.svg")} == {
        f"{table}-{reward}.svg" for table in ("one", "ablation") for reward in ("preference", "shape")
    }


def test_a_grid_that_is_not_done_has_no_rate_and_a_run_that_failed_no_score(tmp_path):
    plan, record = by_hand(tmp_path)
    first, second = plan.tuning("one", "tree")
    record.add({**record.lines[second.key], "failed": "the gradient is not finite"})
    results = Results(plan, record.lines)
    assert results.rate("one", "tree") == (1e-4, True)  # the other one, though its scores were lower
    assert results.runs("one", "tree") == []
    record.lines.pop(first.key)
    assert Results(plan, record.lines).rate("one", "tree") is None
    assert "No run of this table is finished" not in write(plan, record)
    assert "**Seeds are missing** of: tree." in write(plan, record)
    waiting = [[case.kind for case in wave] for wave in waves(plan, Results(plan, record.lines))]
    assert waiting[0] == ["base", "tuning", "tuning"]
    assert len(waiting[1]) == 2  # of chains, whose rate is given


def test_a_rate_whose_trained_reward_is_missing_is_not_the_best(tmp_path):
    plan, record = by_hand(tmp_path)
    first, second = plan.tuning("one", "tree")
    assert Results(plan, record.lines).rate("one", "tree") == (2e-4, True)
    for case, other in ((first, 2e-4), (second, 1e-4)):
        line = record.lines[case.key]
        lines = {**record.lines, case.key: {**line, "scores": {**line["scores"], "preference": [None, None]}}}
        assert Results(plan, lines).rate("one", "tree") == (other, True)


@pytest.mark.parametrize("seeds", [3, 5])
def test_an_interval_holds_what_it_says_where_seeds_and_prompts_both_vary(seeds):
    """Of 2000 studies with effects of seed, prompt and both, 93 % or more have the true mean in it."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        scores = random.normal(0, 0.5, (seeds, 1)) + random.normal(0, 1, (1, 24)) + random.normal(0, 1, (seeds, 24))
        found = crossed(scores)
        held += found.low <= 0 <= found.high
    assert 0.93 <= held / 2000 <= 0.995


def test_what_has_no_interval_says_so_and_a_score_that_is_never_reached_has_no_cost():
    assert np.isnan(crossed(np.array([[1.0, 2.0]])).low)  # one seed
    assert over_seeds([4.0, 4.0]).high == 4.0
    assert np.isnan(crossing([0, 10], [0.1, 0.2], 0.3))
    assert crossing([0, 10], [0.4, 0.5], 0.3) == 0


def slow(case) -> list:
    """A run that takes longer than its limit, and makes progress."""
    with runner.ends_if_hung(8.0) as on_progress:
        for _ in range(4):
            time.sleep(2.5)
            on_progress()
    return []


def hangs(case) -> list:
    """A run that gives up no thread: `sleep` is told to go on after a signal, and holds on to the interpreter."""
    with runner.ends_if_hung(1.0):
        ctypes.PyDLL(None).sleep(600)
    return []


def test_a_run_that_is_slow_but_makes_progress_is_not_ended(tmp_path):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        cases = plan_of(tmp_path).tuning("one", "tree")[:1]
        assert list(Workers(pool, slow).each(cases)) == [(cases[0], [])]


def test_a_run_that_hangs_ends_in_a_line_that_names_it(tmp_path):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        cases = plan_of(tmp_path).tuning("one", "tree")
        with pytest.raises(RuntimeError, match=r"^one: tree, seed 9, lr 0.0001, or .* no progress for hung_after_s"):
            list(Workers(pool, hangs).each(cases))


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_packaged_studies_are_valid_and_the_record_s_seeds_are_not_tuned_on(file):
    plan = Plan(*read_study(file.stem))
    assert load_config(plan.study.config).model.path
    assert all(plan.config(table, variant) for table, has in plan.study.tables.items() for variant in has.variants)
