"""Each benchmark is one command: it prints a table and writes the same as JSON."""

import importlib

import pytest

from g2rpo_ray.algo.completion import completion_path
from g2rpo_ray.config import load_config
from g2rpo_ray.rollout.plan import prompt_tree
from tests.support.benchmarks import BENCHMARKS, quick


def test_rollout(tmp_path):
    plain, *others, ours = quick(tmp_path, "rollout", "--steps")
    # T 4, 4 members, {1, 2}: paths of 3 and 2 evaluations from step 0, the first one alike; twice the same 2 from step
    # 1. The plain structure evaluates the branch step's velocity for each member, too.
    assert plain["evaluations run"] == 4 + 4 * (1 + 3 + 2) + 4 * (1 + 2 + 2)
    assert [row["evaluations run"] for row in (*others, ours)] == [4 + 4 * (3 + 2 - 1) + 4 * 2] * 4
    assert all(row["evaluations a prompt"] == row["evaluations run"] for row in (plain, *others, ours))
    images = [row["images/s"] * row["evaluations run"] / row["evaluations/s"] for row in (plain, *others, ours)]
    # the anchor's; two a member from step 0; from step 1 two that are alike, or one
    assert images == pytest.approx([1 + 4 * 2 + 4 * 2] + [1 + 4 * 2 + 4] * 4)


def test_evaluations_at_the_papers_setting(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    rollout = importlib.import_module("rollout")
    config = load_config(None, [f"sampler.{setting}" for setting in rollout.PAPER])
    assert rollout.plain_evaluations(config.sampler) == 2308
    assert prompt_tree(config, 0, 0, "").evaluations == 1912


def test_rewards(tmp_path):
    assert [row["batch"] for row in quick(tmp_path, "rewards")] == [1, 4]


def test_scaling_on_paper(tmp_path):
    rows = quick(tmp_path, "scaling", "--model")
    # The same schedule, written out: 64 devices, 16 prompts, units of 12. What a member evaluates after a branch step
    # is each start of its paths once.
    paths = [[completion_path(step, 16, stride, "paper") for stride in (1, 2, 3)] for step in range(8)]
    costs = [12 * len({tuple(p[:n]) for p in some for n in range(1, len(p))}) for some in paths]
    assert 16 + sum(costs) == 1912
    ends, waiting = [], []
    for done in range(1, 17):  # all trunks end at 16, one after another; each gives its device back and adds its units
        waiting = sorted(waiting + costs, reverse=True)
        idle = 64 - 16 + done - len(ends)
        ends, waiting = ends + [16 + cost for cost in waiting[:idle]], waiting[idle:]
    for cost in waiting:  # the dearest one to the device that is idle first
        ends[ends.index(min(ends))] += cost
    assert rows[0]["12 a unit"] == pytest.approx(16 * 1912 / (64 * max(ends)), rel=1e-12)
    assert rows[0]["12 a unit"] == pytest.approx(0.919, abs=1e-3)
    assert all(0 < row[f"{size} a unit"] <= 1 for row in rows for size in (12, 6, 3))
