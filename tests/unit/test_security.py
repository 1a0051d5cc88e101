"""Who may use a cluster, what a run writes down, what its files can do, and where it may write."""

import json
from hashlib import sha256

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from g2rpo_ray.commands.train import main
from g2rpo_ray.config import LoraConfig, ModelConfig, load_config
from g2rpo_ray.models import FlowModel, read_lora
from g2rpo_ray.rewards.weights import pretrained, read_weights
from tests.support.tiny_flux import write_tiny_flux
from tests.support.touched import touched  # noqa: F401  fixtures

# ------------------------------------------------------------------------------------------------------------ pickles


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture(params=[True, False], ids=["zip", "before zip"])
def write(request, touched):
    """Writes a file of torch.save, in either format, that runs code when it is unpickled."""

    def write(file):
        content = {"weight": torch.zeros(2), "payload": Payload(touched)}
        torch.save(content, file, _use_new_zipfile_serialization=request.param)

    return write


def test_the_payload_works(write, touched, tmp_path):
    write(tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert touched.exists()


def test_a_reward_s_checkpoint_runs_no_code(write, touched, tmp_path):
    for name in ("weights.pt", "weights.bin", "weights.safetensors"):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=r"^checkpoint: .* cannot read"):
            read_weights(tmp_path / name)
    assert not touched.exists()


def test_an_adapter_runs_no_code(write, touched, tmp_path):
    for name in ("pytorch_lora_weights.safetensors", "adapter.bin"):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=r"^LoRA .*cannot read"):
            read_lora(tmp_path / name, LoraConfig())
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match=r"^LoRA .*cannot read"):
        read_lora(tmp_path, LoraConfig())  # diffusers would take the .bin
    assert not touched.exists()


def test_a_checkpoint_runs_no_code(write, touched, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from g2rpo_ray.learner.engine import CHECKPOINT, _read_checkpoint

    write(tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="cannot be read"):
        _read_checkpoint(tmp_path / CHECKPOINT, {})
    assert not touched.exists()


@pytest.mark.parametrize(
    ("part", "file", "wanted"),
    [
        ("transformer", "diffusion_pytorch_model.bin", "transformer"),
        ("vae", "diffusion_pytorch_model.bin", "vae"),
        ("text_encoder", "pytorch_model.bin", "text_encoders"),
        ("text_encoder_2", "pytorch_model.bin", "text_encoders"),
    ],
)
def test_a_pipeline_runs_no_code(part, file, wanted, write, touched, tmp_path):
    pipeline = write_tiny_flux(tmp_path / "pipeline")
    for weights in (pipeline / part).glob("*.safetensors"):
        weights.unlink()
    write(pipeline / part / file)
    with pytest.raises(ValueError, match="model.path: cannot load"):
        FlowModel.load(ModelConfig(path=str(pipeline), dtype="float32", height=16, width=16), "cpu", **{wanted: True})
    assert not touched.exists()


def test_a_reward_s_model_folder_runs_no_code(write, touched, tmp_path):
    small = CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    CLIPTextModel(small).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    write(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^model: CLIPTextModel cannot load"):
        pretrained(CLIPTextModel, "model", str(tmp_path / "model"))
    assert not touched.exists()


# -------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/tmp/x", "a/b", "a/../../x", ".x", "-x", "a\\b", "x\n", "x\0"]
)
def test_a_run_s_name_is_one_folder(name):
    with pytest.raises(ValueError, match=r"^name: ") as refusal:
        load_config(None, [f"name={json.dumps(name)}"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["../secret", "lora/../../secret", "ABSOLUTE"])
def test_a_checkpoint_s_files_are_in_its_folder(name, tmp_path, capsys):
    """Its list is not followed out of it, though the checksum is right."""
    folder, secret = tmp_path / "checkpoint", tmp_path / "secret"
    (folder / "lora").mkdir(parents=True)
    secret.write_text("mine")
    files = {name.replace("ABSOLUTE", str(secret)): sha256(b"mine").hexdigest()}
    (folder / "state.json").write_text(json.dumps({"iteration": 1, "files": files}))
    assert main(["--set", f"output={tmp_path / 'runs'}", "--resume", str(folder)]) == 2
    assert "is not a readable checkpoint" in capsys.readouterr().err
