"""The report: what it says about runs that go on, ended, or are compared, and how it behaves in a browser."""

import html
import json
import re
from pathlib import Path

from g2rpo_ray.analysis.svg import drawing
from g2rpo_ray.commands.report import main
from g2rpo_ray.config import load_config
from g2rpo_ray.report.page import render
from g2rpo_ray.runs.journal import Journal
from g2rpo_ray.runs.reader import read_run
from g2rpo_ray.runs.storage import Folder
from tests.support.reports import (
    PROMPTS,
    a_run,
    runs,  # noqa: F401  fixtures
)


def text(page):
    """What a reader sees, in one line."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_a_report_tells_the_result_with_its_interval(runs):
    seen = text(render([read_run(str(runs[0]))]))
    assert "ended after 4 iterations" in seen
    # every difference is .1 but for rounding: the interval has no width
    assert "On 2 held-out prompts preference , which was trained on, rose from 0.225 to 0.325: +0.100" in seen
    assert "colour stayed (0.500 → 0.500); shape fell (0.775 → 0.675)" in seen
    assert "actors replaced: 1 . Lost: 2.0 s" in seen
    assert "timeline of all actors in iteration 1" in seen
    assert "λ = 2" not in seen  # one curve needs no legend
    assert "learner.micro_batch" in seen


def test_where_a_run_was_resumed_from_is_told_with_the_settings_that_differ(tmp_path):
    folder = a_run(tmp_path, "resumed", 4, 4)
    origin = {"checkpoint": "/runs/old/checkpoints/000002", "iteration": 0, "settings": {"learner.lr": [0.1, 0.2]}}
    (folder / "resumed_from.json").write_text(json.dumps(origin))
    line = "was resumed from /runs/old/checkpoints/000002 with other settings: learner.lr 0.1 -> 0.2"
    assert f"The run {line}." in text(render([read_run(str(folder))]))
    with Journal(load_config(None, ["name=resumed", "tracking.tensorboard=false"]), folder, 0):
        pass
    assert (folder / "config.yaml").read_text().startswith(f"# {line.removeprefix('was ')}\n")
    assert load_config(str(folder / "config.yaml")).name == "resumed"


def test_a_run_that_goes_on_is_reported_as_far_as_it_is(runs):
    seen = text(render([read_run(str(runs[1]))]))
    assert "3 of 9 iterations are done" in seen
    assert "+0.200" in seen


def test_a_damaged_line_is_left_out_and_told_and_another_damaged_file_is_named(tmp_path, capsys):
    folder = a_run(tmp_path, "damaged", 4, 4)
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], b"\0" * 50, b"null", *lines[3:]]))
    assert main([str(folder)]) == 0
    seen = text((folder / "report.html").read_text())
    assert "metrics.jsonl, line 3 is damaged and left out metrics.jsonl, line 4 is damaged and left out" in seen
    assert "ended after 4 iterations" in seen
    for file in ("samples/000004.json", "summary.json"):
        sound = (folder / file).read_bytes()
        (folder / file).write_bytes(b"\0" * 50)
        assert main([str(folder)]) == 2
        printed = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(rf"error: .*{file} is damaged, not JSON \(.*\); restore it", printed)
        (folder / file).write_bytes(sound)


def test_a_run_before_its_first_iteration_has_a_report(tmp_path):
    assert "there is no comparison with the scores" in text(render([read_run(str(a_run(tmp_path, "new", 3, 0)))]))


def test_runs_are_compared_pair_by_pair(runs):
    seen = text(render([read_run(str(folder)) for folder in runs]))
    assert "preference going-on +0.100 +0.100 to +0.100" in seen
    assert "seed 0 7" in seen.split("Settings in which the runs differ")[1]
    assert "learner.lr" not in seen.split("Settings in which the runs differ")[1].split("All ")[0]


def test_a_report_is_whole_in_itself_and_what_a_prompt_says_is_text(runs):
    page = render([read_run(str(runs[0]))])
    assert len(page) < 1_000_000
    assert not re.findall(r'\b(?:src|href)="(?!data:|#)[^"]*"|url\((?!["\']?data:)|@import', page)
    assert "<b>bold</b>" not in page
    pictures = re.findall(r"<img [^>]*>", page)
    assert len(pictures) > 10
    assert all(re.search(r'alt="[^"]{3,}"', picture) for picture in pictures)
    gallery = json.loads(re.search(r'id="gallery">(.*?)</script>', page, re.DOTALL).group(1))
    assert gallery["prompts"] == PROMPTS
    assert gallery["iterations"] == [0, 4]


def test_the_same_run_gives_the_same_figures(runs):
    one, other = (re.findall(r'src="([^"]+)"', render([read_run(str(runs[0]))])) for _ in range(2))
    assert one == other


def test_a_name_with_dollar_signs_is_no_formula_in_a_figure():
    with drawing() as made:
        made.axes.plot([0, 1], [0, 1], label="$\\frac$ and $x_$")
        made.axes.legend()
    assert "$\\frac$ and $x_$" in made.svg


def test_a_run_on_object_storage_is_read_from_there(runs):
    store = Folder("memory://report/ended")
    store.take(runs[0], newer_than=0)
    there = read_run("memory://report/ended")
    assert there.place == "memory://report/ended"
    seen, expected = (text(render([run])).split("Written")[0] for run in (there, read_run(str(runs[0]))))
    assert seen == expected


def test_the_command_writes_one_file_and_refuses_what_is_no_run(runs, tmp_path, capsys):
    assert main([str(runs[0])]) == 0
    assert (runs[0] / "report.html").stat().st_size > 50_000
    assert main([*map(str, runs), "--output", str(tmp_path / "both.html")]) == 0
    assert "Runs compared" in (tmp_path / "both.html").read_text()
    assert main([str(tmp_path)]) == 2
    assert "has no config.yaml; name a run's folder" in capsys.readouterr().err
    assert main([str(runs[0])] * 9) == 2


def test_the_page_and_its_parts_travel_with_the_package():
    shipped = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"g2rpo_ray.report" = ["page.*"]' in shipped
