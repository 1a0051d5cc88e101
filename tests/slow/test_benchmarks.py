"""The other benchmarks, run small."""

import pytest

from tests.support.benchmarks import quick


def test_rollout_counts_flux(tmp_path):
    one, twelve, lora, decode = quick(tmp_path, "rollout", "--count")
    assert one["weights GB"] == pytest.approx(23.8, abs=0.1)
    # 57 blocks of 12 h² weights, twice a token, and attention's two products
    tokens, h = 2025 + 512, 3072
    blocks = 57 * (2 * 12 * h**2 * tokens + 4 * tokens**2 * h) / 1e12
    assert one["TFLOP"] == pytest.approx(blocks, rel=0.01)
    assert twelve["TFLOP"] == pytest.approx(12 * one["TFLOP"], rel=1e-3)
    assert 1 < lora["TFLOP"] / twelve["TFLOP"] < 1.02
    assert decode["TFLOP"] < one["TFLOP"]


def test_completions(tmp_path):
    fine, coarse = quick(tmp_path, "completions")
    assert (fine["evaluations a member"], coarse["evaluations a member"]) == (9 + 8 + 7 + 6 + 5, 3 + 3 + 3 + 3 + 2)
    assert fine["euler"] == pytest.approx(1)
    assert 0.5 < coarse["euler"] < 1
    assert coarse["dpmpp_2m"] not in (coarse["euler"], fine["dpmpp_2m"])


def test_learner_of_another_method(tmp_path):
    (row,) = quick(
        tmp_path, "learner", "--set", "method=flow_grpo", "--set", "sampler.steps=3", "--set", "sampler.roots=6"
    )
    assert row["states"] == 4 * 6 * 2  # prompts, chains, all steps but the last
    assert row["s an update"] > 0


def test_eps(tmp_path):
    small = ("prompts_per_iteration=1", "steps=3", "branch_steps=[0]", "strides=[1]", "group_size=3")
    settings = [f"{'data' if key.startswith('prompts') else 'sampler'}.{key}" for key in small]
    large, little = quick(tmp_path, "eps", *(part for setting in settings for part in ("--set", setting)))
    assert large["A, relative"] == large["B, relative"] == 0 < little["B, relative"]
    assert little["learner/eps_share"] <= large["learner/eps_share"]


@pytest.mark.cluster
def test_scaling(tmp_path):
    (row,) = quick(tmp_path, "scaling")
    assert (row["units"], row["devices"]) == (18, 8)
    assert 0.3 < row["utilisation"] <= 1


@pytest.mark.cluster
def test_broadcast(tmp_path):
    (row,) = quick(tmp_path, "broadcast")
    assert row["tensors"] == 532


def test_learner(tmp_path):
    (row,) = quick(tmp_path, "learner")
    assert row["states"] == 4 * 5  # prompts, branch steps
    assert row["s an update"] > 0
