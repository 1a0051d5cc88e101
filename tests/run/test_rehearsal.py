"""Hours and money before a run: the arithmetic by hand, the shapes of published models, what the commands say."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from g2rpo_ray.commands.study import main as study_main
from g2rpo_ray.commands.train import main
from g2rpo_ray.config import load_config, with_settings
from g2rpo_ray.models.base import FlowModel
from g2rpo_ray.rehearsal.bench import fits
from g2rpo_ray.rehearsal.calibration import read
from g2rpo_ray.rehearsal.devices import Fleet
from g2rpo_ray.rehearsal.hours import Estimate, describe_hours, evaluations
from g2rpo_ray.rehearsal.published import with_shapes
from g2rpo_ray.rehearsal.simulation import simulate
from g2rpo_ray.rehearsal.times import Times, operations
from tests.support import preloaded

CONFIGS = Path(__file__).parents[2] / "configs"

PARAMETERS = {  # of the transformers, 10^9, as their model cards and files have them
    "black-forest-labs/FLUX.1-dev": 11.901,
    "black-forest-labs/FLUX.2-klein-base-4B": 3.876,
    "Qwen/Qwen-Image": 20.430,
    "Tongyi-MAI/Z-Image": 6.155,
    "stabilityai/stable-diffusion-3.5-medium": 2.243,
}

H100 = Fleet.parse("h100:8@2.50")


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_of_published_models_are_known_without_their_files(name):
    given = load_config("flux_hps", [f"model.path={name}", "model.height=512", "model.width=512"])
    model = FlowModel.skeleton(with_shapes(given).model)
    assert sum(p.numel() for p in model.transformer.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=5e-4)


def test_a_model_that_is_here_is_read_itself_and_an_unknown_one_has_no_shapes():
    quickstart = load_config(None)
    assert with_shapes(quickstart) is quickstart
    assert with_shapes(load_config(None, ["model.path=somebody/else"])) is None
    assert with_shapes(load_config(None, ["model.path=nowhere"])) is None


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_names_a_model_whose_shapes_are_known(file):
    assert with_shapes(load_config(str(file))) is not None


@pytest.mark.parametrize(
    ("given", "kind", "number", "price", "tflops"),
    [
        ("h100:8", "h100", 8, None, 989),
        ("A100:64@1.9", "a100", 64, 1.9, 312),
        ("350tflops:2@0", "350tflops", 2, 0, 350),
    ],
)
def test_devices_are_read(given, kind, number, price, tflops):
    fleet = Fleet.parse(given)
    assert (fleet.kind, fleet.number, fleet.price, fleet.device.tflops) == (kind, number, price, tflops)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "h100",
        "h100:0",
        "h100:8@",
        "h100:8@-1",
        "h100:8@1e9",
        "h100:1000000",
        "v100:8",
        "0tflops:8",
        "9999999tflops:1",
    ],
)
def test_devices_that_cannot_be_are_refused_in_a_line(given):
    with pytest.raises(ValueError, match=r"given; expected KIND:NUMBER .*kinds are a100, .*350tflops$"):
        Fleet.parse(given)


def estimate(state=0.0, heldout=0):
    """A second for an evaluation, at an efficiency of 1."""
    return Estimate(Times({1: 1.0}, {1: 0.0}, {1: state}), (1 / 0.55, 1 / 0.2), heldout)


def test_hours_by_hand():
    """1 rank, 1 reward server and 6 of at most 6 actors; least at 55 %, most at 20 % of what devices have."""
    config = load_config("flux_hps", ["iterations=10", "evaluation.every=4"])
    found = estimate(state=10.0, heldout=24).hours(config, H100)
    assert (found.config.rollout.max_actors, found.devices) == (6, 8)
    simulated = simulate(config, estimate(state=10.0).times)
    assert found.simulated == simulated
    assert simulated.update_s == 128 * 10
    assert simulated.rollout_s == pytest.approx(30592 / 6, rel=0.01)
    assert found.looks_s == 24 / 6 * 4 * 16  # prompts an actor, seeds, steps
    assert evaluations(config) == 1 + 3  # before the first, after 4, 8 and 10
    whole = 10 * simulated.iteration_s + 4 * found.looks_s
    assert found.run_h == pytest.approx((whole / 0.55 / 3600, whole / 0.2 / 3600))
    assert estimate().hours(config, Fleet.parse("h100:5")).config.rollout.max_actors == 3
    with pytest.raises(ValueError, match=r"^--devices: 2 given; the run needs 1 for the learner, 1 for rewards"):
        estimate().hours(config, Fleet.parse("h100:2"))


def test_actors_that_share_devices_take_longer():
    """Twelve with half a GPU each take about as long as six with one each."""
    config = load_config("flux_hps", ["rollout.max_actors=12", "rollout.resources={GPU: 0.5}"])
    halves, wholes = estimate().hours(config, H100), estimate().hours(load_config("flux_hps"), H100)
    assert (halves.config.rollout.max_actors, halves.devices) == (12, 8)
    assert halves.simulated.rollout_s == pytest.approx(wholes.simulated.rollout_s, rel=0.03)
    assert halves.simulated.update_s == wholes.simulated.update_s


def test_the_best_splits_are_the_best_of_all():
    """Updates are most of the work: with 6 actors and 1 rank they take nearly the whole time."""
    config = load_config("flux_hps", ["iterations=1"])
    given = estimate(state=1000.0)
    now, tried = given.hours(config, H100), {}
    for ranks in range(1, 7):
        for actors in range(1, 8 - ranks):
            changes = {"learner.ranks": ranks, "rollout.max_actors": actors}
            tried[ranks, actors] = given.hours(with_settings(config, changes), H100)
    fastest = given.best(now, H100, lambda hours: hours.run_h[0])
    assert fastest == min(tried.values(), key=lambda hours: hours.run_h[0]) == tried[4, 3]
    cheapest = given.best(now, H100, lambda hours: hours.run_h[0] * hours.devices)
    assert cheapest == min(tried.values(), key=lambda hours: hours.run_h[0] * hours.devices)
    assert given.best(fastest, H100, lambda hours: hours.run_h[0]) is fastest


def test_reward_servers_that_do_not_keep_up_get_more_of_them():
    config = load_config("flux_hps")
    given = Estimate(Times({1: 0.01}, {1: 0.0}, {1: 0.1}, scores={"hpsv2": 0.05}), (1.0, 1.0), 0)
    best = given.best(given.hours(config, H100), H100, lambda hours: hours.run_h[0])
    assert best.config.rewards["hpsv2"].replicas > 1
    assert best.devices <= 8


def test_times_by_operations_count_each_state_and_what_is_evaluated_beside_it():
    """The quickstart's tiny model, of which every part can be counted."""
    plain = operations(load_config(None))
    checkpointed = operations(load_config(None, ["learner.gradient_checkpointing=true", "learner.kl_beta=0.1"]))
    one = plain.evaluations[1]
    # 5 steps of a state a prompt: the old policy is evaluated once more at all of them but the first
    assert plain.states[1] == pytest.approx((1 + 1.2 + 4 / 5) * one)
    assert checkpointed.states[1] == pytest.approx((1 + 1 + 1.2 + 1 + 4 / 5) * one)
    assert plain.decodings[1] > 0


def test_hours_need_a_rate_and_a_gpu():
    with pytest.raises(ValueError, match=r"^--devices: rates are of bfloat16 and float16, but model.dtype is float32"):
        describe_hours(load_config(None), 1, H100)
    with pytest.raises(ValueError, match=r"^--devices: given, but rollout.resources or learner.resources have no GPU"):
        describe_hours(load_config(None, ["model.dtype=bfloat16"]), 1, H100)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without runs: with another configuration, that of a `make run` in this one is refused."""
    monkeypatch.chdir(tmp_path)


def test_the_check_tells_hours_and_money_of_devices_that_are_not_here(elsewhere, capsys):
    rented = ["model.dtype=bfloat16", *(f"{section}.resources={{GPU: 1}}" for section in ("rollout", "learner"))]
    given = [part for one in rented for part in ("--set", one)]
    assert main([*given, "--check", "--devices", "h100:8@2.50"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "\ntime:          an iteration takes ",
        "\nbusy:          rollout ",
        "; object store at most ",
        "\nfastest:   ",
        "\ncheapest:  ",
        "\nheld out:  ",
        "\nhours: ",
        "; money ",
        "at 2.5 each an hour",
    ):
        assert part in printed
    assert "error" not in printed
    assert main([*given, "--devices", "h100:8"]) == 2
    assert capsys.readouterr().err == "error: --devices: given without --check; add --check to estimate hours\n"


def test_a_study_tells_the_hours_of_all_its_runs(tmp_path, capsys):
    study = {
        "name": "one", "config": "sd3_g2rpo_lean", "budget": 4000,
        "tables": {"one": {"title": "One", "seeds": [0, 1], "variants": {"lean": {}}}},
    }  # fmt: skip
    (tmp_path / "one.yaml").write_text(json.dumps(study))
    given = [str(tmp_path / "one.yaml"), "--output", str(tmp_path / "out"), "--devices", "a100:16@2"]
    assert study_main([*given, "--check"]) == 0
    assert "An evaluation is 2.44e12 operations: " in capsys.readouterr().out  # by the shapes in the package
    assert study_main(given) == 2
    assert capsys.readouterr().err == "error: --devices: given without --check; add it\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What the command writes for the quickstart in a few seconds, and what it says."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    command = preloaded.python("-m", "g2rpo_ray.bench", "--minutes", 0.01, "--random", "--output", file)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return file, done.stdout


def test_the_bench_measures_every_part_of_a_run_and_what_must_agree(bench):
    file, printed = bench
    found, times = json.loads(file.read_text()), read(file, load_config(None))
    assert list(times.evaluations) == [1, 2, 4, 8, 16]  # up to rollout.micro_batch
    assert times.evaluations[1] < times.evaluations[16] < 16 * times.evaluations[1]
    assert list(times.decodings) == [1, 16]
    assert list(times.states) == [8]  # learner.micro_batch
    assert times.states[8] > times.evaluations[8]
    assert times.scores.keys() == {"preference", "colour", "shape"}
    assert min(*times.scores.values(), times.publish, times.receive) > 0
    assert 1 <= times.cores < 1.2 * len(os.sched_getaffinity(0))
    assert 1e-4 < times.call < 0.1
    assert found["same_bits"] == dict.fromkeys(["rollout", "learner", "rewards.preference", *EVALUATED], True)
    assert found["mismatch_velocity"] < 1e-5
    assert 0 < found["share_of_matmul"] < 1.5
    assert all(size > 0 for pair in found["memory_gib"].values() for size in pair)
    assert "\nmemory, rollout: " in printed


EVALUATED = ["eval_rewards.colour", "eval_rewards.shape"]


def test_a_device_with_too_little_memory_is_told_in_one_line():
    said = "learner.micro_batch: too large for this device's memory; give less: Tried to allocate 2 GiB"
    with pytest.raises(ValueError, match=f"^{said}$"), fits("learner.micro_batch"):
        raise torch.OutOfMemoryError("Tried to allocate\n 2 GiB")


def test_the_check_tells_the_time_of_a_run_by_a_calibration(bench, elsewhere, capsys):
    file, _ = bench
    assert main(["--check", "--calibration", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "\ntime:          an iteration takes " in printed
    assert "\nrests on:      times measured by `g2rpo bench`, on " in printed
    assert main(["--check", "--calibration", str(file), "--set", "rollout.micro_batch=8"]) == 2
    assert "was measured with rollout.micro_batch=16; the configuration has 8" in capsys.readouterr().err
    assert main(["--calibration", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: --calibration: given without --check")


def test_a_calibration_that_is_none_is_refused_in_a_line(tmp_path):
    file = tmp_path / "bench.json"
    for content in ("", "[]", "{}", '{"format": "another"}', '{"format": "g2rpo_ray.bench/1", "seconds": {}}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"^--calibration: .*bench.json is not a file of `g2rpo bench`"):
            read(file, load_config(None))
