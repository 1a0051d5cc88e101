"""The twin of a model, of every family: the classes, latents and schedule of the model, a LoRA, pictures."""

import json
from pathlib import Path

import pytest
import torch

from g2rpo_ray.config import LoraConfig, ModelConfig
from g2rpo_ray.models import FlowModel, add_lora, fold_lora, idle_modules, lora_parameters
from g2rpo_ray.models.base import FAMILIES
from g2rpo_ray.rehearsal.published import FOLDER
from g2rpo_ray.rehearsal.twin import write_twin
from tests.support.tiny_models import write_tiny

PUBLISHED = {
    "flux": "black-forest-labs--FLUX.1-dev",
    "flux2_klein": "black-forest-labs--FLUX.2-klein-base-4B",
    "qwen_image": "Qwen--Qwen-Image",
    "sd3": "stabilityai--stable-diffusion-3.5-medium",
    "z_image": "Tongyi-MAI--Z-Image",
}


@pytest.mark.parametrize("family", sorted(FAMILIES.values()))
def test_the_twin_of_every_family_samples_and_has_gradients(family, tmp_path):
    given = FOLDER / PUBLISHED[family] if family in PUBLISHED else write_tiny(family, tmp_path / "model")
    edits = family == "qwen_image_edit_plus"
    settings = {"height": 32, "width": 32, "max_sequence_length": 32, "sources": int(edits)}
    parameters = write_twin(ModelConfig(path=str(given)), tmp_path / "twin")
    model = ModelConfig(path=str(tmp_path / "twin"), dtype="float32", **settings)
    twin = FlowModel.load(model, "cpu", vae=True, transformer=True, text_encoders=True)
    assert parameters == sum(p.numel() for p in twin.transformer.parameters()) < 500_000
    original = FlowModel.load(ModelConfig(path=str(given), **settings), "meta")
    assert type(twin) is type(original)
    assert twin.latent_shape == original.latent_shape
    assert twin.sigmas(4).equal(original.sigmas(4))
    generator = torch.Generator().manual_seed(2)
    embedding = twin.random_embedding("a red cat", generator) if edits else twin.encode(["a red cat"])[0]
    conditioning = twin.condition([embedding], None)
    x = twin.initial_noise(torch.Generator().manual_seed(0))[None]
    assert twin.decode(x).float().std() > 1
    add_lora(twin.transformer, LoraConfig(rank=2, alpha=2), seed=0)
    fold_lora(twin.transformer)
    parts = lora_parameters(twin.transformer)
    with torch.no_grad():
        for parameter in parts.values():  # B starts at zero
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    twin.velocity(x, torch.tensor([0.7]), conditioning).square().sum().backward()
    idle = idle_modules(twin.transformer)
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for name, parameter in parts.items()
        if not any(module in name for module in idle)
    )


def test_the_twin_has_the_tokenizer_that_is_here_and_refuses_a_part_that_it_does_not_know(tmp_path):
    given = write_tiny("sd3", tmp_path / "model")
    file = given / "tokenizer_3" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"].append(["é", -3.0])
    file.write_text(json.dumps(tokenizer))
    write_twin(ModelConfig(path=str(given)), tmp_path / "twin")
    made = json.loads((tmp_path / "twin" / "tokenizer_3" / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == tokenizer["model"]["vocab"]
    index = given / "model_index.json"
    index.write_text(index.read_text().replace("T5EncoderModel", "BertModel"))
    with pytest.raises(ValueError, match=r"^model.path: it has a BertModel, which has no small version; supported are"):
        write_twin(ModelConfig(path=str(given)), tmp_path / "other")


def test_the_same_files_make_the_same_twin(tmp_path):
    model, folders = ModelConfig(path=str(FOLDER / PUBLISHED["sd3"])), [tmp_path / name for name in "ab"]
    for folder in folders:
        write_twin(model, folder)
        torch.rand(1)
    files = [sorted(Path(folder).rglob("*.safetensors")) for folder in folders]
    assert len(files[0]) == 5
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
