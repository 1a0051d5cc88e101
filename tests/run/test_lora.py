"""The LoRA: added, moved, checked, exported; the export read by diffusers itself."""

import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from g2rpo_ray.config import LoraConfig, ModelConfig
from g2rpo_ray.models import (
    FlowModel,
    WeightsMismatch,
    add_lora,
    check_lora,
    export_lora,
    fold_lora,
    load_lora,
    lora_disabled,
    lora_parameters,
    lora_replaced,
    lora_shapes,
    lora_state,
    manifest_of,
    read_lora,
    verify,
)
from g2rpo_ray.types import FloatArray
from tests.support import preloaded
from tests.support.tiny_flux import write_tiny_flux

CONFIG = LoraConfig(rank=3, alpha=12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # on tiny matrices threads cost far more than they give
    return write_tiny_flux(tmp_path_factory.mktemp("tiny_flux"))


def load(path: Path, lora: LoraConfig = CONFIG, seed: int = 0, dtype: Any = "float32") -> FlowModel:
    config = ModelConfig(path=str(path), dtype=dtype, height=16, width=24, max_sequence_length=12, guidance_scale=2.5)
    model = FlowModel.load(config, "cpu", vae=True, transformer=True, text_encoders=True)
    add_lora(model.transformer, lora, seed)
    return model


def trained(model: FlowModel, seed: int = 1) -> dict[str, FloatArray]:
    """A state whose B is not zero."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.3, array.shape).astype(np.float32)
        for name, array in lora_state(model.transformer).items()
    }


@torch.no_grad()
def velocity(model: FlowModel) -> torch.Tensor:
    x = model.initial_noise(torch.Generator().manual_seed(3))[None]
    return model.velocity(x, torch.tensor([0.8]), model.condition(model.encode(["a red cat"])))


def test_a_new_lora_is_the_base_model_and_alone_trainable(tiny: Path) -> None:
    model = load(tiny)
    with lora_disabled(model.transformer):
        base = velocity(model)
    assert torch.equal(velocity(model), base)
    parameters = lora_parameters(model.transformer)
    trainable = {id(p) for p in model.transformer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in parameters.values()}
    assert len(parameters) == 2 * (8 + 3)  # A and B; the double block has 8 of the default targets, the single one 3
    assert list(parameters) == sorted(parameters)
    assert parameters["transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (3, 16)
    assert parameters["transformer_blocks.0.attn.to_q.lora_B.weight"].abs().max() == 0


def test_the_seed_alone_decides_the_lora(tiny: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = load(tiny, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    states = [lora_state(m.transformer) for m in (first, load(tiny, seed=4), load(tiny, seed=5))]
    checksums = [manifest_of(state, 0).checksum for state in states]
    assert checksums[0] == checksums[1] != checksums[2]
    a = np.concatenate([array.ravel() for name, array in states[0].items() if "lora_A" in name])
    assert abs(a.std() * CONFIG.rank - 1) < 0.1  # PEFT's gaussian: standard deviation 1 / rank


def test_the_lora_is_float32_on_a_bfloat16_base(tiny: Path) -> None:
    model = load(tiny, dtype="bfloat16")
    assert {p.dtype for p in lora_parameters(model.transformer).values()} == {torch.float32}
    assert {p.dtype for p in model.transformer.parameters()} == {torch.float32, torch.bfloat16}
    base = velocity(model)
    load_lora(model.transformer, trained(model))
    assert (velocity(model) - base).abs().max() > 0.1
    with lora_disabled(model.transformer):
        assert torch.equal(velocity(model), base)


def test_disabling_is_undone_also_after_an_error(tiny: Path) -> None:
    model = load(tiny)
    load_lora(model.transformer, trained(model))
    with_lora = velocity(model)
    with pytest.raises(KeyError), lora_disabled(model.transformer):
        raise KeyError
    assert torch.equal(velocity(model), with_lora)
    assert all(p.requires_grad for p in lora_parameters(model.transformer).values())


def test_another_policy_in_place_of_the_lora_has_its_velocities_to_the_bit(tiny: Path) -> None:
    model = load(tiny)
    fold_lora(model.transformer)
    own, state = velocity(model), trained(model)
    with lora_replaced(model.transformer, {name: torch.tensor(array) for name, array in state.items()}):
        replaced = velocity(model)
    assert torch.equal(velocity(model), own)
    load_lora(model.transformer, state)
    assert torch.equal(velocity(model), replaced)
    assert not torch.equal(replaced, own)


def test_all_linear_takes_every_linear_layer(tiny: Path) -> None:
    model = load(tiny, LoraConfig(rank=2, targets="all-linear"))
    bare = FlowModel.load(ModelConfig(path=str(tiny), height=16, width=24), "cpu", transformer=True)
    linear = {n for n, module in bare.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.split(".lora_")[0] for name in lora_parameters(model.transformer)} == linear
    assert "proj_out" in linear


def test_targets_that_match_nothing_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"^lora\.targets: 'attn\.to_w' is not the suffix .*all-linear"):
        load(tiny, LoraConfig(targets=("attn.to_q", "attn.to_w")))


def test_a_state_goes_from_one_model_to_another_in_place(tiny: Path) -> None:
    source, target = load(tiny, seed=1), load(tiny, seed=2)
    state = trained(source)
    for array in state.values():
        array.setflags(write=False)  # as out of Ray's object store
    load_lora(source.transformer, state)
    held = lora_parameters(target.transformer)
    load_lora(target.transformer, lora_state(source.transformer))
    assert all(held[name] is p for name, p in lora_parameters(target.transformer).items())
    assert torch.equal(velocity(source), velocity(target))
    copies = lora_state(target.transformer)
    next(iter(held.values())).data.zero_()
    assert manifest_of(copies, 0) == manifest_of(state, 0)


def test_a_state_of_another_lora_is_refused_whole(tiny: Path) -> None:
    model = load(tiny)
    before = manifest_of(lora_state(model.transformer), 0)
    state = trained(model)
    name = min(state)
    bad = {
        "1 tensors are missing": {n: a for n, a in state.items() if n != name},
        "1 tensors are unexpected": {**state, "x.lora_A.weight": state[name]},
        f"{name} is": {**state, name: state[name][:1]},
    }
    for words, broken in bad.items():
        with pytest.raises(ValueError, match=f"^a LoRA of another model.*{words}"):
            load_lora(model.transformer, broken)
    assert manifest_of(lora_state(model.transformer), 0) == before


def test_a_manifest_tells_any_change(tiny: Path) -> None:
    state = trained(load(tiny))
    manifest = manifest_of(state, 7)
    assert (manifest.version, manifest.tensors) == (7, len(state))
    assert manifest.bytes == sum(array.size * 4 for array in state.values())
    verify(dict(reversed(state.items())), manifest)  # order is no part of it
    name = min(state)
    flipped = state[name].copy()
    flipped.view(np.uint32)[0, 0] ^= 1
    changes = [
        {**state, name: flipped},
        {**state, name: state[name].reshape(-1)},
        {**state, name: state[name].astype(np.float64)},
        {n: a for n, a in state.items() if n != name},
        {n + ("_" if n == name else ""): a for n, a in state.items()},
    ]
    for changed in changes:
        with pytest.raises(WeightsMismatch, match=r"^LoRA version 7: received \d+ tensors .* expected 22 of"):
            verify(changed, manifest)
    with pytest.raises(WeightsMismatch):
        verify(state, dataclasses.replace(manifest, tensors=1))


@torch.no_grad()
@pytest.mark.parametrize("targets", [CONFIG.targets, "all-linear"])
def test_diffusers_reads_the_export(tiny: Path, tmp_path: Path, targets: Any) -> None:
    config = CONFIG.model_copy(update={"targets": targets})
    model = load(tiny, config)
    base = velocity(model)
    load_lora(model.transformer, trained(model))
    assert (velocity(model) - base).abs().max() > 0.1
    export_lora(tmp_path / "lora", lora_state(model.transformer), config, FluxPipeline)

    pipeline: Any = FluxPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "lora")
    x = model.initial_noise(torch.Generator().manual_seed(0))[None]
    theirs = pipeline(
        "a red cat", height=16, width=24, num_inference_steps=4, guidance_scale=2.5,
        max_sequence_length=12, latents=x, output_type="np",
    ).images  # fmt: skip

    sigmas = pipeline.scheduler.sigmas
    conditioning = model.condition(model.encode(["a red cat"]))
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * model.velocity(x, now[None], conditioning)
    assert np.abs(model.decode(x).numpy() / 255 - theirs).max() <= 1 / 255


def test_an_export_is_read_back_as_it_was(tiny: Path, tmp_path: Path) -> None:
    state = trained(load(tiny))
    export_lora(tmp_path, state, CONFIG, FluxPipeline)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    verify(read_lora(tmp_path, CONFIG), manifest_of(state, 0))
    verify(read_lora(tmp_path / "pytorch_lora_weights.safetensors", CONFIG), manifest_of(state, 0))


def test_equal_states_are_equal_files_in_any_process(tmp_path: Path) -> None:
    """What `sha256sum` shows of two runs; safetensors orders two keys of metadata by chance, even within a process."""
    program = (
        "import sys, numpy as np; from g2rpo_ray.config import LoraConfig; from g2rpo_ray.models import export_lora\n"
        "from diffusers import FluxPipeline\n"
        "names = [f'blocks.{i}.attn.to_{x}.lora_{m}.weight' for i in range(3) for x in 'qkv' for m in 'AB']\n"
        "state = {name: np.full((2, 2), float(len(name)), np.float32) for name in sorted(names, key=hash)}\n"
        "for folder in sys.argv[1:]: export_lora(folder, state, LoraConfig(rank=2, alpha=4), FluxPipeline)"
    )
    folders = [[str(tmp_path / f"{seed}{number}") for number in range(8)] for seed in range(2)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # another one than that of the process that forks
    subprocess.run([sys.executable, "-c", program, *folders[0]], env=environment, check=True)
    subprocess.run(preloaded.python("-c", program, *folders[1]), check=True)
    files = [file for names in folders for folder in names for file in Path(folder).iterdir()]
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1
    assert len(files) == 16


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^LoRA .*nowhere: cannot read"):
        read_lora(tmp_path / "nowhere", CONFIG)
    with pytest.raises(ValueError, match=r"^LoRA .*: cannot read pytorch_lora_weights"):
        read_lora(tmp_path, CONFIG)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"^LoRA .*torn.*: cannot read"):
        read_lora(torn, CONFIG)
    other = tmp_path / "other.safetensors"
    save_file({"unet.down.lora_A.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"contains unet\.down"):
        read_lora(other, CONFIG)


def test_shapes_are_known_without_reading_weights(tmp_path: Path) -> None:
    directory = write_tiny_flux(tmp_path)
    model = ModelConfig(path=str(directory), dtype="float32", height=16, width=16)
    transformer = FlowModel.load(model, "cpu", transformer=True).transformer
    add_lora(transformer, LoraConfig(rank=3, targets="all-linear"), seed=0)
    (directory / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    shapes = lora_shapes(model, LoraConfig(rank=3, targets="all-linear"))
    assert shapes == {name: tuple(p.shape) for name, p in lora_parameters(transformer).items()}
    check_lora(shapes, lora_state(transformer))
