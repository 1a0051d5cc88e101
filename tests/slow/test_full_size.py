"""The published models at full size, without data."""

import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.models.estimate import rollout_memory
from g2rpo_ray.rehearsal.full_size import actor_memory, full_size
from g2rpo_ray.rehearsal.published import with_shapes

SHARE = {"sd3_g2rpo_lean": 0.35, "qwen_image_21_edit": 1.0, "wan22_a14b_g2rpo": 1.03, "z_image_g2rpo": 1.01}
"""Bytes of units, of those of an evaluation of `rollout.micro_batch` latents, which lean trees never have at once."""


@pytest.mark.parametrize("name", SHARE)
def test_a_published_model_runs_at_full_size_without_data(name):
    config = with_shapes(load_config(name))
    found, estimate = full_size(config), rollout_memory(config)
    assert found["rollout actor"]["units"] / estimate["velocity"] == pytest.approx(SHARE[name], abs=0.02)
    assert found["rollout actor"]["decode"] == estimate["decode"]
    assert found["learner rank"]["states"] > 10**8


def test_completions_by_actors_of_their_own_have_their_own_batches():
    sets = ["rollout.completions.max_actors=1", "rollout.completions.resources={CPU: 1}"]
    config = load_config(None, [*sets, "rollout.completions.micro_batch=2"])
    exact, cheap = actor_memory(config), actor_memory(config, "completions")
    assert cheap["units"] < exact["units"] / 2
    assert cheap["weights"] == exact["weights"]


def test_a_unit_takes_as_much_as_its_largest_evaluation_and_its_latents():
    full, small = load_config(), load_config(None, ["rollout.micro_batch=4096"])
    assert 1 <= actor_memory(full)["units"] / rollout_memory(full)["velocity"] < 1.1
    assert actor_memory(small)["units"] < rollout_memory(small)["velocity"] / 10  # it has few latents
