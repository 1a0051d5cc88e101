"""The learning rate of each iteration: values by hand, refused settings, and that the optimizer gets it."""

import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.config.resume import differences, settings
from g2rpo_ray.learner.rate import learning_rate


def rates(iterations: int, **given: object) -> list[float]:
    sets = ["learner.lr=1", f"iterations={iterations}", *(f"learner.{key}={value}" for key, value in given.items())]
    learner = load_config(None, sets).learner
    return [learning_rate(learner, iteration, iterations) for iteration in range(iterations)]


def test_values_by_hand():
    assert rates(3) == [1, 1, 1]
    assert rates(4, warmup=3) == [0.25, 0.5, 0.75, 1]
    assert rates(4, lr_schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(6, lr_schedule="linear", warmup=1) == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates(4, lr_schedule="cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert rates(2, lr_schedule="linear", lr_iterations=4) == [1, 0.75]


@pytest.mark.parametrize(
    ("key", "sets"),
    [
        ("learner.lr_iterations", ["learner.lr_iterations=9"]),
        ("learner.lr_iterations", ["learner.lr_schedule=linear", "learner.lr_iterations=9"]),
        ("learner.warmup", ["learner.lr_schedule=cosine", "learner.warmup=10"]),
    ],
)
def test_a_rate_that_contradicts_itself_is_refused(key, sets):
    with pytest.raises(ValueError, match=f"^{key}: "):
        load_config(None, ["iterations=10", *sets])


@pytest.mark.parametrize(
    ("sets", "changed"), [([], set()), (["learner.lr_schedule=linear"], {"learner.lr_iterations"})]
)
def test_a_run_that_is_made_longer_keeps_its_rates(sets, changed):
    made = [settings(load_config(None, [f"iterations={n}", *sets]), [], [], {}) for n in (10, 20)]
    assert set(differences(*made)) == changed
    kept = settings(
        load_config(None, ["iterations=10", "learner.lr_schedule=linear", "learner.lr_iterations=20"]), [], [], {}
    )
    longer = settings(load_config(None, ["iterations=20", "learner.lr_schedule=linear"]), [], [], {})
    assert not differences(kept, longer)


def test_a_run_follows_it_and_a_longer_schedule_begins_alike(alone):
    given = {"learner__lr": 1e-3, "learner__lr_schedule": "linear"}
    whole = alone(**given)
    assert [line["learner/lr"] for line in whole.result().lines] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    constant = alone(learner__lr=1e-3).result().lines
    first, second, _ = whole.result().lines
    assert first["learner/loss"] == constant[0]["learner/loss"]
    assert first["lora/distance"] == constant[0]["lora/distance"]
    assert second["lora/distance"] < constant[1]["lora/distance"]  # a smaller step
