"""The invariants of a run that trains: a line when one breaks, once, and again after it has held."""

import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.runs.training_checks import TrainingChecks

GOOD = {
    "watch/duplicate_children": 0, "watch/other_versions": 0, "watch/flat_groups": 0.2, "reward/preference/std": 0.1,
    "watch/trained_modules": 1.0, "learner/eps_share": 0.01, "watch/lora_effect": 0.05, "watch/lora_delivered": 0.98,
}  # fmt: skip

BROKEN = {
    "watch/duplicate_children": 2, "watch/other_versions": 1, "watch/flat_groups": 0.95, "reward/preference/std": 0.0,
    "watch/trained_modules": 0.36, "learner/eps_share": 0.4, "watch/lora_delivered": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_invariant_has_a_line_of_its_own(name):
    checks = TrainingChecks(load_config())
    assert checks.lines(GOOD) == []
    (line,) = checks.lines({**GOOD, name: BROKEN[name]})
    assert line.startswith(f"WARNING: {name}: ")
    assert "\n" not in line
    assert checks.lines({**GOOD, name: BROKEN[name]}) == []  # said already
    assert checks.lines(GOOD) == []
    assert len(checks.lines({**GOOD, name: BROKEN[name]})) == 1


def test_rounding_is_not_taken_for_a_lora_that_was_not_delivered():
    small = {**GOOD, "watch/lora_effect": 1e-3, "watch/lora_delivered": -3.0}
    assert len(TrainingChecks(load_config()).lines(small)) == 1
    assert TrainingChecks(load_config(None, ["model.dtype=bfloat16"])).lines(small) == []
