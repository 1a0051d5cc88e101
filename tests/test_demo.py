"""What follows a run: its last words, and the demo, which draws what `evaluate` draws, in the browser, too."""

import base64
import io
import shlex
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image

from g2rpo_ray import demo, evaluate
from g2rpo_ray.comparison.adapters import read_adapters
from g2rpo_ray.config import dump_config, load_config
from g2rpo_ray.launch import command
from g2rpo_ray.launch.next_steps import next_steps
from g2rpo_ray.models import export_lora, lora_shapes
from g2rpo_ray.record.storage import Folder
from tests.runs import EMBEDDINGS

PROMPT = "a blue square"
PATIENCE = 120_000  # ms, for slow and busy cores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, as far as the demo needs it, with an adapter that changes pictures."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    config = load_config()
    (folder / "config.yaml").write_text(dump_config(config))
    rng = np.random.default_rng(0)
    shapes = lora_shapes(config.model, config.lora)
    state = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    export_lora(folder / "lora", state, config.lora, FluxPipeline)
    return folder


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
    assert commands.keys() == {"try it", "compare", "go on"}
    assert demo.make_parser().parse_args(commands["try it"][3:]).adapter == [str(run)]
    plan = evaluate.make_plan(evaluate.make_parser().parse_args(commands["compare"][3:]))
    assert [column.adapter.name for column in plan.columns] == ["base", config.name]
    more = command.make_parser().parse_args(commands["go on"][3:])
    assert load_config(more.config, more.set).iterations == 40 + config.iterations
    remote = next_steps(config, Folder("memory://bucket/run"), 40)
    assert "LoRA:       memory://bucket/run/lora" in remote
    assert "compare:" not in remote  # of object storage the files must be fetched first


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
        (["--adapter", "RUN", "--set", "rollout.device=cuda"], ["rollout.device: cuda given", "rollout.device=cpu"]),
    ],
)
def test_invalid_input_is_one_line(run, capsys, arguments, words):
    pytest.importorskip("gradio")
    assert demo.main([str(run) if argument == "RUN" else argument for argument in arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(word in line for word in words)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_prompt_typed_in_a_browser_gives_the_pictures_of_evaluate(run, browser, tmp_path):
    pytest.importorskip("gradio")
    (tmp_path / "prompts.txt").write_text(PROMPT)
    settings = ["--set", f"data.embeddings={EMBEDDINGS.name}", "--prompts", str(tmp_path / "prompts.txt")]
    program = [sys.executable, "-m", "g2rpo_ray.evaluate", *settings, "--adapter", f"mine={run / 'lora'}"]
    subprocess.run([*program, "--seeds", "1", "--output", str(tmp_path / "out")], check=True, capture_output=True)
    expected = [np.array(Image.open(path)) for path in (tmp_path / "out" / "pictures").iterdir()]
    port = "7917"
    served = subprocess.Popen([sys.executable, "-m", "g2rpo_ray.demo", "--adapter", str(run), "--port", port])
    try:
        _wait_for(served, f"http://127.0.0.1:{port}")
        page = browser.new_page()
        told, asked = [], []
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("console", lambda message: message.type == "error" and told.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_function(f"{DRAWN}.length == 2", timeout=PATIENCE)  # drawn at once
        first = _pictures(page)
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Prompt").press("Enter")
        deadline = time.monotonic() + PATIENCE / 1000
        while any((a == b).all() for a, b in zip(first, _pictures(page), strict=True)) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = _pictures(page)
        assert len(found) == len(expected) == 2
        assert all(any((picture == other).all() for other in expected) for picture in found)
        assert not told
        assert all(url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:")) for url in asked)
        page.close()
    finally:
        served.terminate()
        served.wait(30)


def _wait_for(process, url):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the demo did not start")


# not Gradio's own drawings
DRAWN = "[...document.images].filter(image => image.naturalWidth >= 256 && !image.src.startsWith('data:'))"


def _pictures(page):
    """What the page shows, at the size that the model drew it."""
    script = f"""{DRAWN}.map(image => {{
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png").split(",")[1];
    }})"""
    shown = [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in page.evaluate(script)]
    return [picture[::8, ::8, :3] for picture in shown]
