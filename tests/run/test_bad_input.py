"""What a user can get wrong: one line that names it, exit status 2, nothing started."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from g2rpo_ray.commands.train import main
from g2rpo_ray.config import LoraConfig, ModelConfig, RewardConfig
from g2rpo_ray.models import export_lora, lora_shapes
from g2rpo_ray.rewards.pictures import Picture
from g2rpo_ray.rewards.trial import trial
from tests.support.refusals import assert_refused
from tests.support.tiny_flux import write_tiny_flux


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "not-a-pipeline").mkdir()
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state.json").write_text("{half")
    other = write_tiny_flux(folder / "other")
    lora = LoraConfig(rank=16, alpha=16, targets="all-linear")
    shapes = lora_shapes(ModelConfig(path=str(other)), lora)
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    export_lora(folder / "lora", state, lora, FluxPipeline)
    (folder / "rslora").mkdir()
    tensors = {f"base_model.model.x.lora_{part}.weight": torch.ones(16, 16) for part in "AB"}
    save_file(tensors, folder / "rslora" / "adapter_model.safetensors")
    (folder / "rslora" / "adapter_config.json").write_text('{"lora_alpha": 16, "use_rslora": true}')
    return folder


CASES = {
    "unknown key": (["--set", "sampler.granularities=[1]"], ["sampler.granularities: unknown key"]),
    "wrong type": (["--set", "iterations=soon"], ["iterations: 'soon' given", "integer"]),
    "missing file": (["--config", "FILES/none.yaml"], ["--config: cannot read", "none.yaml"]),
    "missing model": (["--set", "model.path=FILES/none"], ["model.path: ", "is not a directory", "hub id"]),
    "no pipeline": (["--set", "model.path=FILES/not-a-pipeline"], ["model.path: ", "has no model_index.json"]),
    "granularity 0": (["--set", "sampler.strides=[0]"], ["sampler.strides: [0] given", "at least 1"]),
    "step beyond T": (["--set", "sampler.branch_steps=[10]"], ["sampler.branch_steps: [10] given", "0..9"]),
    "no such method": (["--set", "method=grpo"], ["method: 'grpo' given", "allowed are awm, ", "g2rpo"]),
    "a group of one": (["--set", "sampler.group_size=1"], ["credit.group: siblings given", "alone in its group"]),
    "no noise to train": (
        ["--set", "method=flow_grpo_fast", "--set", "sampler.branch_steps=[8]"],
        ["sampler.kernel: cps given, which has no noise in a step that ends at the image"],
    ),
    "empty prompts": (["--set", "data.train_prompts=FILES/empty.txt"], ["data.train_prompts: ", "holds no prompt"]),
    "all held out": (
        ["--set", "data.train_prompts=embedded:prompts_heldout.txt"],
        ["data.train_prompts: all 12 are also in data.heldout_prompts"],
    ),
    "few prompts": (["--set", "data.prompts_per_iteration=500"], ["data.prompts_per_iteration: 500 given"]),
    "unreadable checkpoint": (["--resume", "FILES/checkpoint"], ["--resume: ", "not a readable checkpoint"]),
    "no checkpoint": (["--resume", "FILES/none"], ["--resume: ", "not a readable checkpoint"]),
    "LoRA of another model": (["--set", "lora.initial=FILES/lora"], ["lora.initial: a LoRA of another model"]),
    "no LoRA": (["--set", "lora.initial=FILES/none"], ["lora.initial: ", "cannot read"]),
    "LoRA with another scale": (["--set", "lora.initial=FILES/rslora"], ["lora.initial: ", "with use_rslora=True"]),
    "the same for a model that is not here, with --check": (
        ["--check", "--set", "lora.initial=FILES/rslora", "--set", "model.path=some/model"],
        ["lora.initial: ", "with use_rslora=True"],
    ),
    "unknown reward": (["--set", "rewards.preference.kind=taste"], ["rewards.preference.kind: 'taste' given", "hpsv2"]),
    "missing reward file": (
        ["--set", "rewards.preference.options.checkpoint=FILES/none.pt"],
        ["rewards.preference.options.checkpoint: no file"],
    ),
    "too little memory": (["--set", "rollout.memory_gib=0.5"], ["rollout.memory_gib: 0.5 given; not enough"]),
    "memory of a model that is not here": (
        ["--set", "rollout.memory_gib=80", "--set", "model.path=some/model"],
        ["model.path: cannot load 'some/model'", "download it where the hub can be reached"],
    ),
    "an output below a file": (["--set", "output=FILES/empty.txt/runs"], ["output: cannot use ", "empty.txt"]),
    "no wandb": (["--set", "tracking.wandb_project=x"], ["tracking.wandb_project: given, but wandb is not installed"]),
    "brackets without end": (["--set", "data.train_prompts=FILES/deep.json"], ["data.train_prompts: ", "too deep"]),
    "name outside its folder": (["--name", "../x"], ["name: '../x' given"]),
    "no number of seconds": (["--wait", "soon"], ["argument --wait: 'soon' given; must be seconds from 0 to 86400"]),
    "too long a wait": (["--wait", "1e9"], ["argument --wait: '1e9' given; must be seconds from 0 to 86400"]),
    "no such check": (["--check", "all-of-it"], ["argument --check: invalid choice: 'all-of-it'", "settings"]),
    "a setting, in the short check": (["--check", "settings", "--set", "learner.lr=-1"], ["learner.lr: -1 given"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_status_2(case, files, tmp_path, capsys):
    arguments, parts = CASES[case]
    status = main(["--set", f"output={tmp_path}", *(argument.replace("FILES", str(files)) for argument in arguments)])
    assert_refused(status, capsys.readouterr().err, parts, tmp_path)


ONLY_CHECKED = {
    "a size that is no multiple": (["model.height=34"], ["model.height: 34 given; must be a multiple of "]),
    "a size that no machine has": (
        ["model.height=8192", "model.width=8192", "rollout.micro_batch=4096"],
        ["rollout.micro_batch: 4096 given; an actor needs ", "images of 8192 × 8192"],
    ),
    "no such backend": (
        ["rollout.attention_backend=best"],
        ["rollout.attention_backend: 'best' given; allowed are flash"],
    ),
    "no such layer": (["lora.targets=[attn.to_x]"], ["lora.targets: 'attn.to_x' is not the suffix of"]),
    "no such module": (
        ["rewards.preference.kind=nomod:fac"],
        ["rewards.preference: reward kind: nomod:fac cannot be imported (ModuleNotFoundError"],
    ),
    "more GPUs than there are": (
        ["learner.resources={GPU: 1}", "learner.ranks=200"],
        ["learner.resources: the run asks for 200 GPU in all (learner.resources 200); this machine has"],
    ),
}


@pytest.mark.parametrize("case", ONLY_CHECKED)
def test_check_finds_what_only_the_actors_would(case, tmp_path, capfd):
    sets, parts = ONLY_CHECKED[case]
    arguments = [part for override in [f"output={tmp_path}", *sets] for part in ("--set", override)]
    status = main([*arguments, "--check"])
    assert_refused(status, capfd.readouterr().err, parts, tmp_path)


def test_settings_alone_are_checked_without_what_takes_long(tmp_path):
    program = (
        "import sys; from g2rpo_ray.commands.train import main;"
        f"status = main(['--set', 'output={tmp_path}', '--check', 'settings']);"
        "print(status, 'ray' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["settings:      ok", "0 False False"]
    assert not list(tmp_path.iterdir())


def test_check_needs_no_cluster_and_little_time(tmp_path):
    """All that can be said: the plan, and that the rewards, of which there are three, gave a score."""
    command = [sys.executable, "-m", "g2rpo_ray.run", "--set", f"output={tmp_path}", "--check"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    print(f"--check of the quickstart: {time.monotonic() - started:.1f} s")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("method: ")
    assert re.match(r"cluster: +none given; this machine, with \d+ CPU, \d+ GPU, has what the run needs", lines[-1])
    assert "not checked" not in done.stdout
    assert not done.stderr
    assert not list(tmp_path.iterdir())


TRIED = {
    "exits when it is imported": ("sys.exit('no licence')", "reward kind: .* .SystemExit: no licence"),
    "ends its process": ("os._exit(3)", "its process ended with status 3 before the first score"),
    "never returns": ("time.sleep(1000)", "no score within startup_timeout_s=3"),
    "cannot be built": ("def build(): raise OSError('no disk')", "reward .*: its factory raised OSError: no disk"),
    "cannot score": ("class build:\n def score(self, images, prompts): raise KeyError('x')", "KeyError: 'x'"),
    "gives no scores": (
        "class build:\n def score(self, images, prompts): return [1.0]",
        r"score\(\) returned \[1.0\]; expected 2 numbers, one per image",
    ),
}


@pytest.mark.parametrize("case", TRIED)
def test_a_reward_that_cannot_work_is_told_in_check(case, tmp_path, monkeypatch):
    text, reason = TRIED[case]
    (tmp_path / f"reward_that_{case.replace(' ', '_')}.py").write_text(f"import os, sys, time\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = {"rewards.mine": RewardConfig(kind=f"reward_that_{case.replace(' ', '_')}:build", resources={"CPU": 1})}
    limit_s = 3 if case == "never returns" else 60
    if limit_s == 60:
        rewards = {"rewards.first": RewardConfig(kind="jpeg_compressibility", resources={"CPU": 1}), **rewards}
    refused = pytest.raises(ValueError, match=f"^rewards.mine: {reason}")
    pictures = [Picture("noise", "a red circle", np.zeros((16, 16, 3), np.uint8))] * 2
    with trial(rewards, pictures, limit_s) as tried, refused:
        tried()
