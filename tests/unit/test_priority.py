"""Which actors find a place, by hand-made nodes: no Ray."""

import pytest

from g2rpo_ray.actors.cluster import check_places
from g2rpo_ray.actors.pool.packing import place
from g2rpo_ray.config import load_config

ALL = "has what the run needs"


def config(**more):
    """A learner of two chips, a reward of half a chip, and at most six rollout actors."""
    settings = {
        "learner.resources": "{chip: 2}", "rollout.resources": "{chip: 1}", "rollout.max_actors": 6,
        "rewards.preference.resources": "{chip: 0.5}", **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize(
    ("chips", "room"),
    [
        ([9], ALL),
        ([2, 8], ALL),
        ([8], "has room for 5 rollout actors, at least rollout.min_actors=1; the others of rollout.max_actors=6 wait"),
        ([1, 2, 1], "has room for 1 rollout actors, at least"),
    ],
)
def test_the_check_says_for_how_many_rollout_actors_there_is_room(chips, room):
    assert check_places(config(), [{"CPU": 4, "chip": number} for number in chips]).startswith(room)


@pytest.mark.parametrize(
    ("chips", "more", "told"),
    [
        ([1] * 8, {}, "learner.resources: room for 0 of 1 actors, each with 2 chip on one node, beside the others; "),
        ([3, 1], {"learner__ranks": 2}, "learner.resources: room for 1 of 2 actors, each with 2 chip on one node"),
        (
            [3, 3],
            {"rollout__resources": "{chip: 2}", "rollout__min_actors": 2, "rewards__preference__resources": "{}"},
            "learner.resources: room for 0 of 1",
        ),
        ([3] * 3, {"data__encoder_resources": "{chip: 4}"}, "data.encoder_resources: room for 0 of 1 actors"),
    ],
)
def test_the_check_refuses_a_cluster_whose_nodes_are_too_small_though_their_sum_is_not(chips, more, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        check_places(config(**more), [{"CPU": 4, "chip": number} for number in chips])


def test_an_actor_goes_where_least_is_left_and_custom_resources_pin_it():
    nodes = [{"chip": 8.0, "learner": 1.0}, {"chip": 1.0}, {"CPU": 4.0}]
    assert place([(1, {"chip": 1.0}), (2, {"chip": 4.0}), (1, {"learner": 1.0}), (2, {})], nodes) == [1, 2, 1, 2]
    assert place([(3, {"chip": 0.3}), (1, {"chip": 0.1})], [{"chip": 1.0}]) == [3, 1]  # in tenths, rounded
