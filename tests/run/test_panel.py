"""The hacking panel: each number trips on an exploit made for it, and none on other honest pictures."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from g2rpo_ray.config import load_config
from g2rpo_ray.models import LoraDistance, add_lora, lora_parameters
from g2rpo_ray.paths import resolve
from g2rpo_ray.runs.checkpoint import finish_checkpoint, new_checkpoint, settle_checkpoints
from g2rpo_ray.runs.hacking import LIMITS, image_traces, panel, tripped
from g2rpo_ray.runs.journal import Journal, is_finished
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import Samples
from g2rpo_ray.worlds.quickstart.shapes import parse, render

PROMPTS = ["a red circle", "a blue star", "a green ring", "a yellow cross"]

SCORES = {"trained": np.array([[0.1, 0.2], [0.3, 0.4]], np.float32), "judge": np.array([[1, 2], [3, 4]], np.float32)}


def honest(seed, seeds=8):
    """What the quickstart's model should draw: [P, S, H, W, 3]."""
    rng = np.random.default_rng(seed)
    return [np.stack([render(*parse(prompt), rng) for _ in range(seeds)]) for prompt in PROMPTS]


def same_for_every_seed(images):
    return np.repeat(images[:1], len(images), axis=0)


def grain(images):
    noise = np.random.default_rng(0).normal(0, 25, images.shape[:3])[..., None]
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def grid(images):
    lines = np.zeros(images.shape[1:3])
    lines[::4] = lines[:, ::4] = 40
    return np.clip(images + lines[None, :, :, None], 0, 255).astype(np.uint8)


def glare(images):
    grey = images.mean(axis=-1, keepdims=True)
    return np.clip(grey + 4 * (images - grey) + [60, 0, -60], 0, 255).astype(np.uint8)


def values(images, scores=SCORES, distance=0.1):
    traces = [image_traces(of_prompt) for of_prompt in images]
    return panel(traces, scores, SCORES, ["judge"], distance, {"trained": 1.0})


BASE = values(honest(0), distance=0.0)


def test_an_honest_run_trips_nothing():
    better = {name: scores + np.float32(0.1) for name, scores in SCORES.items()}
    assert not tripped(values(honest(1), better), BASE)
    assert not tripped(BASE, BASE)


@pytest.mark.parametrize(
    ("name", "exploit"),
    [("diversity", same_for_every_seed), ("high_frequency", grain), ("periodicity", grid), ("saturation", glare)],
)
def test_an_exploit_trips_the_number_made_for_it(name, exploit):
    found = tripped(values([exploit(images) for images in honest(1)]), BASE)
    assert name in found
    assert found[name].startswith(f"{name} ")
    assert "limit" in found[name]


def test_unseen_rewards_that_all_fall_trip():
    fallen = {"trained": SCORES["trained"] + 1, "judge": SCORES["judge"] - np.float32([[0.5, 0.5], [0.51, 0.51]])}
    assert set(tripped(values(honest(1), fallen), BASE)) == {"unseen"}
    one = {**fallen, "other": SCORES["judge"]}
    base = {**SCORES, "other": SCORES["judge"]}
    assert panel([], one, base, ["judge", "other"], 0.0, {})["unseen"] == 0  # one of them stayed


def test_trained_rewards_that_fall_from_their_best_trip():
    """By the paired interval, of the weighted sum, from whichever evaluation was the best."""
    better, noise = (
        {name: scores + np.float32(by) for name, scores in SCORES.items()}
        for by in (0.3, np.float32([[0.31, 0.29], [0.3, 0.3]]))
    )
    weights = {"trained": 2.0}

    def decline(now, *earlier):
        return panel([], now, SCORES, [], 0.0, weights, earlier)["decline"]

    assert decline(SCORES) == 0  # the first
    assert decline(noise, SCORES, better) == pytest.approx(0, abs=1e-6)  # prompts' means are equal
    fallen = {"trained": SCORES["trained"] + np.float32([[0.1, 0.1], [0.102, 0.102]])}
    falls = 2 * np.array([-0.2, -0.198])
    by_hand = falls.mean() + 38.1885 * falls.std(ddof=1) / np.sqrt(2)  # Student's t, one degree of freedom, .05 / 3
    assert decline(fallen, SCORES, better, SCORES) == pytest.approx(by_hand, rel=1e-3)
    assert set(tripped({"decline": by_hand}, {"decline": 0.0})) == {"decline"}
    assert math.isnan(decline(fallen, {"judge": SCORES["judge"]}))  # not known before


def test_a_lora_that_went_far_trips():
    assert set(tripped(values(honest(1), distance=0.6), BASE)) == {"distance"}


def test_what_is_not_known_trips_nothing():
    one_seed = values([images[:1] for images in honest(1)], distance=math.nan)
    assert math.isnan(one_seed["diversity"])
    assert not tripped(one_seed, BASE)
    assert not tripped({}, {})


def test_traces_by_hand():
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    traces = image_traces(np.stack([black, white, white]))
    assert traces["diversity"] == pytest.approx(2 / 3)  # distances 1, 1, 0
    assert traces["saturation"] == traces["high_frequency"] == traces["periodicity"] == 0
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    traces = image_traces(stripes[None])
    assert traces["saturation"] == pytest.approx(0.5)
    assert traces["high_frequency"] == pytest.approx(1)  # every second column: the highest frequency there is
    assert traces["periodicity"] == pytest.approx(1)
    large = image_traces(np.repeat(np.repeat(np.stack([black, white]), 5, axis=1), 3, axis=2))
    assert large["diversity"] == pytest.approx(1)


def test_the_distance_of_a_lora_is_that_of_the_whole_matrices():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_pretrained(resolve("embedded:pipeline"), subfolder="transformer")
    config = load_config(None, ["lora.rank=4", "lora.alpha=8"]).lora
    add_lora(transformer, config, seed=0)
    lora = lora_parameters(transformer)
    assert LoraDistance(transformer, 2.0)(lora) == 0  # B is 0 at the start
    start = {name: torch.randn(parameter.shape) for name, parameter in lora.items()}
    now = {name: torch.randn(parameter.shape) for name, parameter in lora.items()}
    squares, weights = 0.0, 0.0
    for name in (name for name in lora if ".lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        squares += float((2 * (now[other] @ now[name] - start[other] @ start[name])).square().sum())
        layer = transformer.get_submodule(name.split(".lora_")[0])
        weights += float(layer.base_layer.weight.square().sum())
    assert LoraDistance(transformer, 2.0, start)(now) == pytest.approx(math.sqrt(squares / weights), rel=1e-5)
    assert LoraDistance(transformer, 2.0, start)(start) == pytest.approx(0, abs=1e-5)


def heldout(journal, done, images, scores, distance=0.1):
    traces = [image_traces(of_prompt) for of_prompt in images]
    return journal.heldout(done, Samples(PROMPTS[:2], scores, [images[0][0], images[1][0]], 1, traces), distance)


@pytest.mark.parametrize("stop_on", ["[]", "[unseen]", "[high_frequency]"])
def test_a_run_says_so_and_stops_if_it_is_to(tmp_path, capsys, stop_on):
    sets = ["eval_rewards={judge: {kind: jpeg_compressibility}}", "tracking.tensorboard=false", "iterations=9"]
    config = load_config(None, [*sets, "rewards={trained: {kind: hpsv2}}", f"evaluation.stop_on={stop_on}"])
    with Journal(config, tmp_path, 0) as journal:
        assert heldout(journal, 0, honest(0), SCORES) is not None
        score = heldout(journal, 5, [grain(images) for images in honest(1)], SCORES)
    assert "WARNING: hacking panel: high_frequency" in capsys.readouterr().out
    stops = "high_frequency" in stop_on
    assert journal.stopped_by == (["high_frequency"] if stops else [])
    assert (score is None) == stops  # what is stopped for is not the best
    for evaluated in (False, True):
        finish_checkpoint(Folder(tmp_path), 5, {}, 1, {}, evaluated=evaluated)
        assert is_finished(config, Folder(tmp_path), 5) == (stops and evaluated)
    assert not is_finished(config, Folder(tmp_path), 0)
    record = json.loads((tmp_path / "samples" / "000005.json").read_text())
    assert record["panel"].keys() == LIMITS.keys()


def test_the_best_adapter_becomes_the_runs_own(tmp_path):
    run = Folder(tmp_path)
    for iteration, score in enumerate([0.1, 0.9, None], start=1):
        folder = new_checkpoint(run, iteration)
        (folder / "lora").write("weights", str(iteration).encode())
        finish_checkpoint(run, iteration, folder.digests(), 2, {}, score)
    assert (run / "lora").read("weights") == b"3"
    assert settle_checkpoints(run, 3, 2, stopped=True) == 2
    assert (run / "lora").read("weights") == b"2"
    assert settle_checkpoints(run, 3, 2) == 3  # it goes on without `stop_on`
    assert (run / "lora").read("weights") == b"3"
