"""What is on the hub is fetched before anything waits for it: all of it, and no more than is loaded."""

import os
import shutil
import subprocess
import sys

import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.hub import all_files
from g2rpo_ray.paths import resolve
from tests.support.hub import serve_hub

LOAD = """
import sys
from g2rpo_ray.config import load_config
from g2rpo_ray.models import FlowModel
from g2rpo_ray.rewards.files import locate
config = load_config(None, sys.argv[1:])
FlowModel.load(config.model, "cpu", transformer=True, vae=True, text_encoders=True)
print(locate("checkpoint", config.rewards["preference"].options["checkpoint"], ""))
"""

HERE = """
import sys
from g2rpo_ray.config import load_config
from g2rpo_ray.hub import unchecked_files
from g2rpo_ray.rehearsal.published import with_shapes
config = load_config(None, sys.argv[1:])
print(with_shapes(config) and with_shapes(config).model.is_local)
print([line.split(": ")[0] for key, reward in config.rewards_by_key.items() for line in unchecked_files(key, reward)])
"""


def repository(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


@pytest.fixture
def repos(tmp_path):
    shutil.copytree(resolve("embedded:pipeline"), tmp_path / "pipeline")
    (tmp_path / "hps").mkdir()
    shutil.copy(resolve("embedded:preference.pt"), tmp_path / "hps" / "HPS.pt")
    return {
        "tiny/pipeline": repository(tmp_path / "pipeline", "whole-model.safetensors"),
        "tiny/hps": repository(tmp_path / "hps", "other.pt"),
        "tiny/clip": repository(tmp_path / "clip", "config.json", "model.safetensors", "pytorch_model.bin", "tf.h5"),
        "tiny/old": repository(tmp_path / "old", "config.json", "pytorch_model.bin"),
        "tiny/large": repository(tmp_path / "large", "config.json", "merges.txt", "model.safetensors"),
    }


def sets(**more):
    given = {
        "model.path": "tiny/pipeline",
        "rewards.preference.options.checkpoint": "tiny/hps:HPS.pt",
        "rewards.pick": "{kind: pickscore, options: {model: tiny/clip, processor: tiny/large}}",
        "eval_rewards.looks": "{kind: aesthetic, options: {checkpoint: 'tiny/hps:HPS.pt', backbone: tiny/old}}",
    }
    return [f"{key}={value}" for key, value in (given | more).items()]


def call(home, hub, *command):
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0" if hub else "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_configuration_names_what_is_fetched():
    flux = {(files.key, files.name) for files in all_files(load_config("flux_hps_clip"))}
    assert flux == {
        ("model.path", "black-forest-labs/FLUX.1-dev"),
        ("rewards.hpsv2.options.checkpoint", "xswu/HPSv2:HPS_v2.1_compressed.pt"),
        ("rewards.clip.options.checkpoint", "apple/DFN5B-CLIP-ViT-H-14:open_clip_pytorch_model.bin"),
    }
    assert all_files(load_config()) == []
    video = "{kind: videoalign, options: {part: motion_quality}}"
    sections = ["rewards.a={kind: hpsv3}", "rewards.b={kind: hpsv3, weight: 2}", f"rewards.c={video}"]
    defaults = all_files(load_config(None, sections))
    assert [(f.name, f.weights) for f in defaults] == [
        ("MizzenAI/HPSv3:HPSv3.safetensors", True),
        ("Qwen/Qwen2-VL-7B-Instruct", False),  # 16 GB of weights are not needed
        ("KwaiVGI/VideoReward:checkpoint-11352/model.pth", True),
        ("Qwen/Qwen2-VL-2B-Instruct", False),
    ]


def test_what_a_judge_is_asked_is_no_file_to_fetch():
    judge = "{kind: unified_reward, options: {url: 'http://h', model: org/name}, resources: {CPU: 1}}"
    config = load_config(None, ["model.path=tiny/pipeline", f"rewards.judge={judge}"])
    assert [files.name for files in all_files(config)] == [
        "tiny/pipeline"
    ]  # not the instruction, which is long, nor what the server has


def test_what_is_fetched_is_all_that_is_loaded_and_no_more(repos, tmp_path):
    arguments = [part for one in sets() for part in ("--set", one)]
    absent = call(tmp_path / "home", "", "-c", HERE, *sets()).stdout.splitlines()
    assert absent[0] == "None"
    assert len(absent[1].split(",")) == 5  # the checkpoint of one reward, and two of each of the others
    with serve_hub(repos) as hub:
        done = call(tmp_path / "home", hub, "-m", "g2rpo_ray.commands.main", "fetch", *arguments)
        assert done.returncode == 0, done.stderr
        assert "model.path: tiny/pipeline" in done.stdout
        assert done.stdout.splitlines()[-1] == "5 fetched"  # the HPS checkpoint once
    found = {path.name for path in (tmp_path / "home" / "hub").rglob("snapshots/*/**/*") if path.is_file()}
    assert {"model_index.json", "HPS.pt", "config.json", "model.safetensors", "pytorch_model.bin"} <= found
    assert not found & {"whole-model.safetensors", "other.pt", "tf.h5"}
    cached = {path.parent.parent.parent.name: path for path in (tmp_path / "home" / "hub").rglob("snapshots/*/*.*")}
    assert set(cached) == {f"models--tiny--{name}" for name in ("pipeline", "hps", "clip", "old", "large")}
    for name, absent in (("clip", "pytorch_model.bin"), ("large", "model.safetensors")):
        assert not list((tmp_path / "home" / "hub" / f"models--tiny--{name}").rglob(f"snapshots/*/{absent}"))
    loaded = call(tmp_path / "home", "", "-c", LOAD, *sets())  # without the hub
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip().endswith("HPS.pt")
    here = call(tmp_path / "home", "", "-c", HERE, *sets())
    assert here.stdout.splitlines() == ["True", "[]"], here.stderr


def test_what_cannot_be_fetched_is_one_line(repos, tmp_path):
    with serve_hub(repos) as hub:
        done = call(tmp_path, hub, "-m", "g2rpo_ray.fetch", "--set", "model.path=tiny/none")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: model.path: cannot download tiny/none (")
    assert "HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
