"""Every configuration of the package rehearsed on the twin of its model; what is wrong with one, all of it."""

from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from g2rpo_ray.commands.rehearse import main
from g2rpo_ray.config import load_config, with_settings
from g2rpo_ray.models.flux import Model
from g2rpo_ray.paths import resolve
from g2rpo_ray.rehearsal.devices import Device, Fleet
from g2rpo_ray.rehearsal.findings import Findings, look, look_at_memory, servers_memory
from g2rpo_ray.rehearsal.full_size import encoder_memory
from g2rpo_ray.rehearsal.published import with_shapes
from g2rpo_ray.rehearsal.small import small
from g2rpo_ray.rehearsal.twin import write_twin
from tests.support.rehearsals import CONFIGS, cases, process  # noqa: F401  a fixture


@pytest.mark.parametrize(("check", "file"), cases(common=True))
def test_every_configuration_is_rehearsed(check, file, process, tmp_path):
    check(file, process, tmp_path)


def changed(before: object, after: object, key: str = "") -> set[str]:
    """The dotted keys of settings that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        return {
            one for name in {**before, **after} for one in changed(before.get(name), after.get(name), f"{key}.{name}")
        }
    return set() if before == after else {key.removeprefix(".")}


@pytest.mark.parametrize("name", ["flux_hps", "sd3_awm", "sd3_flow_grpo"])
def test_a_rehearsal_keeps_what_a_run_does_and_makes_smaller_how_much(name, tmp_path):
    config = load_config(name, ["learner.zero_stage=2", "learner.lr_schedule=cosine", "learner.warmup=20"])
    found = look(config)
    settings = [one.model_dump(mode="json") for one in (config, small(config, found.untried, found.prompts, tmp_path))]
    differ = changed(*settings)
    assert {key for key in differ if key.split(".")[0] in ("method", "sampler", "credit", "lora", "seed")} == set()
    assert {key for key in differ if key.startswith("learner.")} <= {
        "learner.resources.GPU", "learner.resources.CPU", "learner.ranks", "learner.warmup",
        "learner.lr_iterations",
    }  # fmt: skip
    assert {key for key in differ if key.startswith("rollout.")} <= {
        "rollout.resources.GPU", "rollout.resources.CPU", "rollout.max_actors",
        "rollout.completions.resources.GPU", "rollout.completions.resources.CPU",
    }  # fmt: skip
    assert settings[1]["learner"]["lr_iterations"] == config.iterations  # so the rate is that of the run's beginning


def test_all_that_is_wrong_with_a_configuration_is_named_and_not_the_first_thing_alone(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na sign that says 'stop'\n")
    given = [
        "model.height=500", "lora.targets=[nothing]", f"output={tmp_path}/file/runs", "rewards.hpsv2=null",
        "rewards.text.kind=ocr", "rewards.text.resources={CPU: 1}", "rewards.clip.kind=clip",
        "rewards.clip.options={checkpoint: nowhere.pt}", "tracking.wandb_project=tests",
        f"data.train_prompts={tmp_path}/prompts.txt", "data.prompts_per_iteration=3",
    ]  # fmt: skip
    options = [part for one in given for part in ("--set", one)]
    assert main(["--config", "sd3_g2rpo", *options, "--output", str(tmp_path / "new"), "--local"]) == 1
    printed = capsys.readouterr().out
    problems = [line.removeprefix("problem:").strip() for line in printed.splitlines() if line.startswith("problem:")]
    assert [line.split(":")[0] for line in problems] == [
        "output", "tracking.wandb_project", "model.height", "rewards.text", "rewards.clip.options.checkpoint",
    ]  # fmt: skip
    assert "the prompt 'a cat' has no quoted text" in problems[3]
    assert printed.count("\nstand-in:") == 2
    assert "\nrehearsed:     failed: lora.targets: 'nothing' is not the suffix of" in printed


def test_a_model_that_is_unknown_here_has_no_twin(tmp_path, capsys):
    assert main(["--set", "model.path=somebody/else", "--output", str(tmp_path / "new"), "--local"]) == 1
    printed = capsys.readouterr().out
    assert "somebody/else is a hub id" in printed
    assert "rehearsed:     no; a twin needs" in printed
    assert main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --output: {tmp_path} given, which is not empty; give a new folder\n"


def test_memory_at_full_size_is_compared_with_a_device_and_each_kind_of_actor_too_large_is_a_problem():
    found = Findings(shaped=load_config(None))
    lines = look_at_memory(found.shaped, found, Fleet("small", Device(1.0, 1.08), 1))
    folder = Path(load_config(None).model.location)
    encoders = [
        load_file(file) for part in ("text_encoder", "text_encoder_2") for file in (folder / part).glob("*.safe*")
    ]
    weights = sum(tensor.nbytes for tensors in encoders for tensor in tensors.values()) / 1e9
    assert [line.split(":")[0] for line in lines] == ["rollout actor", "learner rank", "encoder"]
    assert f"GB: weights {weights:.3g}, encoding " in lines[2]
    assert [problem.split(",")[0] for problem in found.problems] == [
        "a rollout actor needs 1.09 GB", "a learner rank needs 1.09 GB",
    ]  # fmt: skip


ENCODED = ["sd3_g2rpo", "flux2_klein_g2rpo", "wan21_g2rpo", "qwen_image_g2rpo", "qwen_image_21_edit"]


@pytest.mark.parametrize("name", ENCODED)
def test_text_encoders_of_every_class_are_run_without_data(name, tmp_path):
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    write_twin(with_shapes(config).model, tmp_path)
    files = [load_file(file) for file in tmp_path.glob("text_encoder*/*.safetensors")]
    weights = sum(tensor.size for tensors in files for tensor in tensors.values())
    short, long = (
        encoder_memory(with_settings(config, {"model.path": str(tmp_path), "model.max_sequence_length": length}))
        for length in (32, 64)
    )
    assert short["weights"] == long["weights"] == pytest.approx(2 * weights, rel=0.1)  # bfloat16; tied ones count once
    assert 1 <= long["encoding"] / short["encoding"] <= 4  # masks grow by the square


def test_memory_of_a_reward_on_a_gpu_is_that_of_its_weights_and_of_scoring_a_batch():
    config = load_config(None, ["rewards.preference.resources={GPU: 1}", "rewards.preference.batch_size=4"])
    one = load_config(None, ["rewards.preference.resources={GPU: 1}", "rewards.preference.batch_size=1"])
    weights = torch.load(resolve(config.rewards["preference"].options["checkpoint"]), weights_only=True)["state_dict"]
    found = []
    for given in (config, one):
        looked = look(given)
        found.append(servers_memory(given, looked)["server of rewards.preference"])
        assert looked.problems == []
    assert found[0]["weights"] == pytest.approx(4 * sum(one.numel() for one in weights.values()), rel=0.02)
    assert found[0]["weights"] == found[1]["weights"]
    assert 2 < found[0]["scoring"] / found[1]["scoring"] <= 4


def test_a_model_that_mixes_devices_or_shapes_is_found_at_full_size_in_a_line(monkeypatch):
    """As on a GPU, where tensors that a family makes on the CPU cannot be added to its own."""
    monkeypatch.setattr(Model, "image_ids", torch.zeros(64, 3, device="cpu"))
    found = Findings(shaped=load_config(None))
    assert look_at_memory(found.shaped, found, Fleet.parse("h100:8")) == []
    assert found.problems[0].startswith("model.path: embedded:pipeline fails at full size: ")
