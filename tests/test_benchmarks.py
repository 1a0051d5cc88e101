"""Each benchmark is one command: it prints a table and writes the same as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def quick(tmp_path, name, *arguments):
    file = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert f"## {found['title']}" in done.stdout
    assert "| " + " | ".join(found["rows"][0]) + " |" in done.stdout
    assert {"cpu", "cores", "torch"} <= found["machine"].keys()
    return found["rows"]


def test_rollout(tmp_path):
    plain, *_, ours = quick(tmp_path, "rollout", "--steps")
    assert (plain["evaluations run"], ours["evaluations run"]) == (48, 32)


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


def test_rewards(tmp_path):
    assert [row["batch"] for row in quick(tmp_path, "rewards")] == [1, 4]


def test_learner(tmp_path):
    assert quick(tmp_path, "learner")[0]["s an update"] > 0


def test_scaling_on_paper(tmp_path):
    rows = quick(tmp_path, "scaling", "--model")
    assert rows[0]["12 a unit"] == pytest.approx(0.928, abs=1e-3)
    assert all(0 < row[f"{size} a unit"] <= 1 for row in rows for size in (12, 6, 3))


@pytest.mark.cluster
@pytest.mark.slow
def test_scaling(tmp_path):
    (row,) = quick(tmp_path, "scaling")
    assert (row["units"], row["devices"]) == (18, 8)
    assert 0.3 < row["utilisation"] <= 1


@pytest.mark.cluster
@pytest.mark.slow
def test_broadcast(tmp_path):
    (row,) = quick(tmp_path, "broadcast")
    assert row["tensors"] == 532
