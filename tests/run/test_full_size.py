"""The actors' own code at full size, without data."""

import pytest
import torch

from g2rpo_ray.allocations import Allocations
from g2rpo_ray.commands.plan import describe_plan
from g2rpo_ray.config import load_config
from g2rpo_ray.learner.loss import EdgeLoss
from g2rpo_ray.models import FlowModel
from g2rpo_ray.rehearsal.full_size import UNIT, full_size, learner_memory, longest_prompt, unit_memory
from g2rpo_ray.rollout.plan import branch_units, prompt_tree
from g2rpo_ray.rollout.sampler import Sampler


def on_cpu(config):
    """Peaks of the bytes of a trunk unit and of a branch unit that are computed here."""
    model = FlowModel.load(config.model, "cpu", transformer=True, vae=True)
    sampler, embedding = Sampler(config, model), longest_prompt(config, model)
    trunk, _ = sampler.trunk(UNIT, embedding)
    branch = next(branch_units(config, prompt_tree(config, 0, 0, ""), UNIT))
    decode, peaks = model.decode, []
    for run in (lambda: sampler.trunk(UNIT, embedding), lambda: sampler.branch(branch, embedding, trunk)):
        with Allocations("units", "cpu") as allocations:
            model.decode = allocations.apart("decode", decode)
            run()
        peaks.append(allocations.peaks)
    return peaks


@pytest.mark.parametrize("name", ["quickstart", "video_quickstart"])
def test_a_unit_takes_the_bytes_that_it_takes_where_it_is_computed(name):
    config = load_config(name)
    for branch, real in zip((False, True), on_cpu(config), strict=True):
        found = unit_memory(config, branch)
        assert found["units"] == pytest.approx(real["units"], rel=0.25)
        assert found["decode"] == pytest.approx(real["decode"], rel=0.25)


def test_the_learner_counts_what_its_loss_evaluates():
    def states(*sets):
        return learner_memory(load_config(None, list(sets)), 2, False)["states"]

    plain = states()
    assert 3.5 < states("method=pave_grpo") / plain < 5  # substeps, and gradients through all
    assert plain <= states("learner.kl_beta=0.1") < 1.1 * plain  # the base has no gradients
    assert states("method=diffusion_nft", "sampler.roots=12") == pytest.approx(plain, rel=0.1)


def test_a_loss_that_fails_at_full_size_is_a_line(monkeypatch):
    monkeypatch.setattr(EdgeLoss, "_on_device", lambda self, array: torch.tensor(array))  # it stays on the CPU
    with pytest.raises(ValueError, match=r"^model.path: embedded:pipeline fails at full size: "):
        full_size(load_config())


def test_what_only_the_check_cannot_evaluate_is_a_line_of_the_plan(monkeypatch):
    monkeypatch.setattr(EdgeLoss, "_on_device", lambda self, array: torch.tensor(array))  # it stays on the CPU
    plan = describe_plan(load_config()).splitlines()
    (line,) = [line for line in plan if line.startswith("memory:        of learner ranks unknown: ")]
    assert "fails at full size" in line
    assert not any(line.startswith("on 24 GB") for line in plan)
