"""The tutorials' commands run as they are printed, in one folder, in the order of the pages.

A block of commands with a title says by it what it needs and is not run. Another block with a title is that file.
Training runs are cut to two small iterations.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
NAMES = re.findall(r"\]\(tutorials/(\w+)\.md\)", (ROOT / "docs" / "index.md").read_text())
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SMALL = (
    "iterations=2 data.prompts_per_iteration=2 sampler.branch_steps=[0] sampler.group_size=4 evaluation.seeds=1 "
    "evaluation.every=0 eval_rewards={} rollout.max_actors=1 tracking.tensorboard=false"
)
SHORTER = """#!/bin/sh
case "$*" in run*--check*) ;; run*) set -- "$@" {settings} ;; esac
exec {python} -m g2rpo_ray.commands.main "$@"
"""


def blocks(name: str) -> list[tuple[str, str, str]]:
    """Language, title and text of each block of a page."""
    return BLOCK.findall((PAGES / f"{name}.md").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a newcomer works, with a `g2rpo` that makes training runs small."""
    folder = tmp_path_factory.mktemp("newcomer")
    settings = " ".join(f"--set '{setting}'" for setting in SMALL.split())
    script = folder / "bin" / "g2rpo"
    script.parent.mkdir()
    script.write_text(SHORTER.format(python=sys.executable, settings=settings))
    script.chmod(0o755)
    return folder


def test_the_index_names_each_tutorial():
    assert sorted(NAMES) == sorted(page.stem for page in PAGES.glob("*.md"))


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_tutorial_work(name, folder):
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    for language, title, text in blocks(name):
        if language == "sh" and not title:
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(
                command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=550
            )
            assert done.returncode == 0, done.stdout + done.stderr
        elif language != "sh" and title:
            file = folder / title
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)


def test_a_reward_of_ones_own_has_trained_an_adapter(folder):
    assert (folder / "runs" / "warm" / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert (folder / "warm.png").exists()
