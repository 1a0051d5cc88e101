"""Whole runs with rewards that need their groups, and with rewards in environments of their own."""

import json

import numpy as np
import pytest

from tests.support.judge_server import chat_server
from tests.support.runs import PREFERENCE, finish, lora, metrics, run, same_lora, start

pytestmark = pytest.mark.cluster

EXACT = PREFERENCE | {
    "iterations": 2,
    "rollout__micro_batch": 1,
    "rollout__decode_batch": 1,
    "evaluation__grid_prompts": 0,
}


def test_win_rates_are_the_same_whatever_the_slices_and_the_actors(tmp_path):
    """Pairwise by a judge, who says nothing of blue pictures, and win rates by the preference model."""
    with chat_server(module="tests.unit.test_judges") as url:
        judge = {"kind": "pairwise", "resources": {}, "retries": 0, "options": {"base_urls": url}}
        rewards = {"judge": judge, "preference": {"win_rate": True, "batch_size": 1}}
        given = [
            f"rewards.{name}.{key}={json.dumps(value)}" for name in rewards for key, value in rewards[name].items()
        ]
        sets = [part for one in given for part in ("--set", one)]
        other = {"rollout__max_actors": 2, "rollout__members_per_unit": 1, "rewards__judge__replicas": 2}
        runs = [
            start(tmp_path, "one", *sets, **EXACT),
            start(tmp_path, "sliced", *sets, **EXACT | other),
        ]
        said = [finish(process) for process in runs]
    same_lora(lora(tmp_path, "one"), lora(tmp_path, "sliced"))
    one, sliced = metrics(tmp_path, "one"), metrics(tmp_path, "sliced")
    for at in (1, 2):
        assert one[at]["reward/preference/mean"] == pytest.approx(0.5)  # of a win rate, always
        assert one[at]["reward/judge/mean"] == pytest.approx(0.5)
        for key in ("reward/judge/std", "reward/preference/std", "reward/judge/missing", "learner/grad_norm"):
            assert one[at][key] == sliced[at][key], key
    assert "judge –" in said[0]  # held-out images have no group
    assert one[0]["heldout/preference/mean"] != pytest.approx(0.5)  # the score itself
    assert 0 < one[0]["heldout/preference/mean"] < 1
    assert any(np.abs(tensor).max() > 0 for name, tensor in lora(tmp_path, "one").items() if "lora_B" in name)


def test_a_run_without_a_judge_of_held_out_images_does_not_start(tmp_path):
    said = run(
        tmp_path, "none", "--set", "rewards.preference=null",
        "--set", "rewards.rank.kind=tests.support.faulty:build_rank", "--set", "rewards.rank.resources={}", status=1,
    )  # fmt: skip
    assert "eval_rewards: rank compares images of a group, so it cannot score held-out images" in said
