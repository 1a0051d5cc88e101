"""The demo in a browser."""

import base64
import io
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.support.demos import (
    PROMPT,
    run,  # noqa: F401  fixtures
)
from tests.support.runs import EMBEDDINGS

PATIENCE = 120_000  # ms, for slow and busy cores


@pytest.mark.cluster
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
        deadline, found = time.monotonic() + PATIENCE / 1000, first
        # while they are drawn anew there may be fewer
        while len(found) < 2 or any((a == b).all() for a, b in zip(first, found, strict=True)):
            assert time.monotonic() < deadline
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
