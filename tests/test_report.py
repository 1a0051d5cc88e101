"""The report: what it says about runs that go on, ended, or are compared, and how it behaves in a browser."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from g2rpo_ray.algo import Shape, plan_tree
from g2rpo_ray.config import load_config
from g2rpo_ray.record.journal import Journal, summarize
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.report import read_run, render
from g2rpo_ray.report.__main__ import main
from g2rpo_ray.types import Place, PromptRollout, Rollout, Samples, Span, UnitReport

PROMPTS = ["a <b>bold</b> cat", "a dog & a fox"]
UPDATE = {"actor/clip_fraction": 0.25, "actor/ratio_max_dev": 1e-3, "actor/ratio_initial_max_dev": 1e-7,
          "advantage/std": 1.5}  # fmt: skip
SPANS = [Span("rollout-0", "10.0.0.1", "trunk/0/0", 1.0, 2.0, 0), Span("run", "driver", "update", 3.0, 1.0)]


def a_run(output, name, iterations, done, rise=0.1, seed=0):
    """What a run leaves: the quickstart's settings, a prompt of two children an iteration, two held-out prompts."""
    sets = [f"name={name}", f"output={output}", f"iterations={iterations}", "tracking.tensorboard=false"]
    config = load_config(None, [*sets, f"seed={seed}"])
    folder = output / name
    tree = plan_tree(Shape(4, children=2, strides=(1, 2)))
    reports = [UnitReport("trunk/0/0", "rollout-0", Place(1, "n", "a"), 0.0, 0, 10, 1, 2.0, 0.5)]
    with Journal(config, folder, 0) as journal:
        journal.heldout(0, samples(0.0))
        for i in range(1, done + 1):
            scores = np.linspace(0, rise * i, len(tree.leaf), dtype=np.float32)[None]
            prompt = PromptRollout(i, 0, "p", tree, scores, None, None, ())
            anchors = {name: np.array([rise * i], np.float32) for name in config.all_rewards}
            if i == done:
                journal.heldout(i, samples(rise))
            counts = {"rollout/restarts": float(i == 1), "perf/lost_s": 2.0 * (i == 1)}
            journal.iteration(i, Rollout([prompt], anchors, reports, i, 2.0, 1.5), UPDATE, counts, SPANS)
        if done == iterations:
            summarize(config, folder)
    return folder


def samples(rise):
    pictures = [np.full((32, 32, 3), 40 + 500 * rise, np.uint8), np.full((32, 32, 3), 60, np.uint8)]
    trained = np.array([[0.2, 0.4], [0.1, 0.2]], np.float32) + np.float32(rise)
    unseen = np.array([[0.5, np.nan], [0.5, 0.5]], np.float32)
    scores = {"preference": trained, "colour": unseen, "shape": 1 - trained}
    return Samples(PROMPTS, scores, pictures, 40)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    return [a_run(output, "ended", 4, 4), a_run(output, "going-on", 9, 3, rise=0.2, seed=7)]


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
    assert "who did what when in iteration 1" in seen
    assert "λ = 2" not in seen  # one curve needs no legend
    assert "learner.micro_batch" in seen


def test_settings_that_changed_on_the_way_are_told_with_the_iteration(tmp_path):
    folder = a_run(tmp_path, "changed", 4, 4)
    line = {"iteration": 2, "checkpoint": None, "settings": {"learner.lr": [0.1, 0.2]}, "judged_alike": True,
            "set_aside": "set_aside/1"}  # fmt: skip
    (folder / "changes.jsonl").write_text(json.dumps(line) + "\n")
    seen = text(render([read_run(str(folder))]))
    assert "The run went on otherwise than it began: since iteration 2: learner.lr 0.1 -> 0.2" in seen
    assert "what the run had written before is in set_aside/1" in seen


def test_a_run_that_goes_on_is_reported_as_far_as_it_is(runs):
    seen = text(render([read_run(str(runs[1]))]))
    assert "3 of 9 iterations are done" in seen
    assert "+0.200" in seen


def test_a_run_before_its_first_iteration_has_a_report(tmp_path):
    assert "nothing to compare with" in text(render([read_run(str(a_run(tmp_path, "new", 3, 0)))]))


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


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("several", [False, True])
def test_in_a_browser(runs, browser, tmp_path, width, several):
    file = tmp_path / "report.html"
    file.write_text(render([read_run(str(folder)) for folder in runs[: 1 + several]]))
    page = browser.new_page(viewport={"width": width, "height": 850})
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing beside the page
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("h1").inner_text() == ("Runs compared" if several else "ended")
    shown = page.locator('img[data-column="1"]').first
    after = shown.get_attribute("src")
    assert "preference 0.3" in page.locator(".scores").nth(1).inner_text()
    slider = page.get_by_label("Iteration", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "after 0 iterations"
    assert shown.get_attribute("src") == page.locator('img[data-column="0"]').first.get_attribute("src") != after
    page.keyboard.press("End")
    assert shown.get_attribute("src") == after
    details = page.locator("#settings details")
    details.locator("summary").press("Enter")
    assert details.locator("td").first.is_visible()
    assert not told
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()


def test_the_page_and_its_parts_travel_with_the_package():
    shipped = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"g2rpo_ray.report" = ["page.*"]' in shipped
