"""Presets through the command line, and the documentation of them."""

import subprocess
from pathlib import Path

import pytest

from g2rpo_ray.methods import method_names
from tests.support import preloaded
from tests.support.method_runs import SMALL, settings_of
from tests.support.runs import (
    same_lora,
)

EVALUATIONS = {  # of the two prompts of each of two iterations, by hand: 5 steps
    "flow_grpo": [2 * 3 * 5] * 2,
    "mix_grpo": [2 * (1 + 3 * 4), 2 * (2 + 3 * 3)],  # the window has slid: a longer trunk, shorter chains
    "branch_grpo": [2 * (1 + 2 * (1 + 2 + 4 + 4))] * 2,  # splits at 1 and 2 of 5
    "diffusion_nft": [2 * 3 * 5] * 2,
    "awm": [2 * 3 * 5] * 2,
}

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", SMALL)
def test_the_bits_do_not_depend_on_how_a_tree_is_cut_into_units(method, alone):
    """All that actors have to do with a method: which of its units they do. Evaluations are counted by hand above."""
    given = settings_of(method) | {"rollout__micro_batch": 1, "rollout__decode_batch": 1}
    cut, whole = (alone(**given | {"rollout__members_per_unit": members}) for members in (1, 100))
    assert [line["rollout/evaluations"] for line in cut.result().lines] == EVALUATIONS[method]
    same_lora(cut.result().lora, whole.result().lora)


def test_a_method_s_tables_in_the_docs_are_what_the_plan_says():
    done = subprocess.run(preloaded.python("docs/methods.py", "--tables"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "methods.md").read_text()
    for table in done.stdout.strip().split("\n\n"):
        assert table in text


def test_every_method_has_a_picture_drawn_from_its_plan(tmp_path):
    done = subprocess.run(preloaded.python("docs/methods.py", "--output", tmp_path), capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "methods.md").read_text()
    for method in method_names():
        assert f"methods/{method}.svg" in text
        drawn, kept = ((folder / f"{method}.svg").read_text() for folder in (tmp_path, ROOT / "docs" / "methods"))
        assert drawn.count("<use") == kept.count("<use") > 0  # as many nodes, whatever matplotlib makes of a line
