"""Evaluation: the statistics, what may not be mixed, hybrid sampling, and real small evaluations on Ray."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from diffusers import FluxPipeline
from PIL import Image
from safetensors.numpy import load_file, save_file

from g2rpo_ray.comparison.scorebook import Cell, ScoreBook
from g2rpo_ray.comparison.statistics import interval, row
from g2rpo_ray.comparison.tables import to_csv, to_markdown
from g2rpo_ray.config import load_config
from g2rpo_ray.evaluate import main, make_parser, make_plan
from g2rpo_ray.models import FlowModel, export_lora, lora_shapes
from g2rpo_ray.record.heldout import compare_all, table
from g2rpo_ray.record.tracking import read_lines
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import SampleUnit
from tests.runs import EMBEDDINGS, descendants, finish, kill_all, wait_for

NAN = math.nan
PROMPTS = ("a red circle", "a blue star")


def random_state(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = lora_shapes(config.model, config.lora)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters and prompts, right and wrong."""
    folder = tmp_path_factory.mktemp("files")
    config = load_config()
    export_lora(folder / "lora", random_state(config), config.lora, FluxPipeline)
    export_lora(folder / "other", random_state(config, 1), config.lora, FluxPipeline)
    for name, changes in (("rank", {"rank": 4}), ("alpha", {"alpha": 4}), ("targets", {"targets": ("attn.to_q",)})):
        lora = config.lora.model_copy(update=changes)
        export_lora(folder / name, random_state(config.model_copy(update={"lora": lora})), lora, FluxPipeline)
    (folder / "plain").mkdir()
    file = "pytorch_lora_weights.safetensors"
    save_file(load_file(folder / "lora" / file), folder / "plain" / file)  # as diffusers wrote it without metadata
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "scores.jsonl").write_text("{half\n")
    return folder


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


def test_one_prompt_has_no_interval_and_says_so():
    base, scores = np.array([[1.0, 3.0]], np.float32), np.array([[2.0, 3.0]], np.float32)
    text = to_markdown([row(10, "base", "taste", True, base, None), row(10, "new", "taste", True, scores, base)])
    assert "| base | 2.0000 (one alone: no error) |" in text
    assert "| new | taste | +0.5000 | one prompt gives none | 75.0% | 2 |" in text
    one, none = scores[:, :1], np.full((1, 1), NAN, np.float32)
    of_pairs = table(compare_all({"taste": base[:, :1], "other": none}, {"taste": one, "other": none}), ["taste"])
    assert "| taste (trained) | 1.0000 | 2.0000 | +1.0000 (one alone: no error) | 100% | 1 |" in of_pairs
    assert "| other | – | – | – | – | 0 |" in of_pairs
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


def plan_of(files, *given):
    return make_plan(make_parser().parse_args(["--prompts", str(files / "prompts.txt"), *given]))


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
    "missing prompts": (["--prompts", "FILES/none.txt"], ["--prompts: cannot read", "none.txt"]),
    "adapter without a name": (["--adapter", "FILES/lora"], ["--adapter: ", "must look like NAME=PATH"]),
    "adapter called base": (["--adapter", "base=FILES/lora"], ["--adapter: the name 'base' is taken"]),
    "one name twice": (["--adapter", "a=FILES/lora", "a=FILES/other"], ["--adapter: the name 'a' is taken"]),
    "no adapter there": (["--adapter", "a=FILES/none"], ["--adapter a: ", "cannot read"]),
    "another rank": (["--adapter", "a=FILES/rank"], ["--adapter a: ", "has rank 4", "give --set lora.rank=4"]),
    "another alpha": (["--adapter", "a=FILES/alpha"], ["--adapter a: ", "has alpha 4", "give --set lora.alpha=4"]),
    "alpha of a file without metadata": (
        ["--adapter", "a=FILES/plain", "--set", "lora.alpha=32"],
        ["--adapter a: ", "has alpha 16", "give --set lora.alpha=16"],
    ),
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


def arguments(files, output):
    adapter, prompts = f"new={files / 'lora'}", str(files / "prompts.txt")
    return ["--adapter", adapter, "--prompts", prompts, "--grid", "1", "--steps", "30", "60", "--seeds", "8",
            "--output", str(output), "--set", f"data.embeddings={EMBEDDINGS.name}"]  # fmt: skip


def start(files, output, *settings):
    command = [sys.executable, "-m", "g2rpo_ray.evaluate", *arguments(files, output), *settings]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def by_cell(output):
    lines = read_lines(output / "scores.jsonl")
    cells = {(line["key"], line["steps"], line["prompt"]): line["scores"] for line in lines}
    assert len(cells) == len(lines)  # nothing twice
    return cells


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """An evaluation that nothing disturbs: its folder and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    return output, finish(start(files, output, "--set", "rollout.max_actors=1"))


@pytest.mark.cluster
def test_an_evaluation_leaves_what_the_documentation_promises(files, whole):
    output, printed = whole
    assert "| base | " in printed
    assert "| new | preference | " in printed
    rows = json.loads((output / "table.json").read_text())["rows"]
    assert [(r["steps"], r["adapter"], r["reward"]) for r in rows] == [
        (steps, adapter, reward)
        for steps in (30, 60)
        for adapter in ("base", "new")
        for reward in ("preference", "colour", "shape")
    ]
    assert all(r["scores"] == 16 and r["missing"] == 0 for r in rows)
    assert all(r["pairs"] == (0 if r["adapter"] == "base" else 16) for r in rows)
    assert (output / "table.md").read_text().strip() in printed
    assert Image.open(output / "grid-30.png").size == (2 * 96, 14 + 96 + 14)
    assert main([*arguments(files, output)]) == 0  # all is there: no cluster is started


@pytest.mark.cluster
@pytest.mark.timeout(1200)  # Ray starts three times
def test_killed_then_interrupted_then_finished_is_as_if_never_stopped(files, whole, tmp_path):
    """With another number of actors, too."""
    killed = start(files, tmp_path)
    wait_for(killed, lambda: len(read_lines(tmp_path / "scores.jsonl")) >= 1)
    kill_all(killed)
    first = by_cell(tmp_path)

    interrupted = start(files, tmp_path)
    wait_for(interrupted, lambda: len(read_lines(tmp_path / "scores.jsonl")) > len(first))
    children = descendants(interrupted)
    interrupted.send_signal(signal.SIGINT)
    printed = finish(interrupted, status=130)
    assert "of 8 units are scored and kept; the same command goes on from there" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]

    finish(start(files, tmp_path))
    scores = by_cell(tmp_path)
    assert len(first) < len(scores) == 2 * 2 * 2  # policies, steps, prompts
    assert first.items() <= scores.items()
    assert by_cell(whole[0]) == scores
    assert (whole[0] / "table.csv").read_text() == (tmp_path / "table.csv").read_text()
