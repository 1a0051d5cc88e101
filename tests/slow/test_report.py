"""The report in a browser."""

import pytest

from g2rpo_ray.report.page import render
from g2rpo_ray.runs.reader import read_run
from tests.support.reports import runs  # noqa: F401  fixtures


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
