"""What the pages of the documentation name exists: linked files, and tests given as proof."""

import re
import subprocess
from pathlib import Path

import pytest

from g2rpo_ray.config.resume import NO_EFFECT

ROOT = Path(__file__).parents[2]

PAGES = [page for folder in (ROOT, ROOT / "deploy", ROOT / "benchmarks") for page in folder.glob("*.md")]
PAGES += [page for folder in ("docs", "g2rpo_ray") for page in (ROOT / folder).rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    files = [page.parent / link for link in links if "://" not in link]
    assert [file for file in files if not file.exists()] == []
    # a file that git ignores is in this checkout alone; status 1: none is, 128: no checkout
    ignored = (
        subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True) if files else None
    )
    assert ignored is None or ignored.stdout == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_exist(page):
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    files = re.findall(r"\btests/\w+(?:/\w+)*(?:\.py)?\b", page.read_text())
    assert [file for file in files if not (ROOT / file).exists()] == []
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert {name for name in named if f"def {name}" not in tests} == set()


def test_the_settings_that_may_change_freely_are_listed() -> None:
    text = (ROOT / "docs" / "howto" / "resume.md").read_text()
    listed = text.split('title="settings that change no bit"\n')[1].split("```")[0].replace("\n", " ").split(", ")
    assert sorted(name.strip() for name in listed) == sorted(NO_EFFECT)
