"""How the processes of a run compute. Of the GPU's kernels only the switches can be seen on a CPU."""

import os
from pathlib import Path

import pytest
import torch

from g2rpo_ray.config import load_config
from g2rpo_ray.config.schema import TORCH_ATTENTION
from g2rpo_ray.models import FlowModel
from g2rpo_ray.numerics import cuda_fault, set_up_torch


@pytest.fixture(autouse=True)
def as_before():
    threads, cudnn, matmul = torch.get_num_threads(), torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
    yield
    torch.set_num_threads(threads)
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_the_switches_of_torch(deterministic, backward, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_up_torch(deterministic, 1, backward)
    assert torch.get_num_threads() == 1
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic == torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.is_deterministic_algorithms_warn_only_enabled() == (deterministic and not backward)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


def test_gpus_that_torch_cannot_use_are_told_with_the_driver_that_it_needs(monkeypatch):
    """As with a driver that is too old: NVML counts a GPU, and CUDA does not start."""
    if torch.cuda.is_available():
        pytest.skip("CUDA works here")
    assert cuda_fault().startswith("torch finds no GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "(torch " in cuda_fault()
    assert "580 or newer for CUDA 13): update the driver" in cuda_fault()


def test_every_process_that_computes_sets_them():
    root = Path(__file__).parents[2]
    actors = [f"actors/workers/{name}.py" for name in ("rollout", "reward", "encoder")]
    for file in (*actors, "learner/engine.py", "g2rpo_ray/commands/demo.py"):
        assert "    set_up_torch(" in (root / file).read_text(), file


def test_backends_that_the_settings_name_are_those_of_diffusers():
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = {backend.value for backend in AttentionBackendName}
    assert set(TORCH_ATTENTION) < names
    assert {"_flash_3", "sage"} < names


def test_rollout_and_learner_may_have_attention_of_their_own():
    config = load_config(None, ["rollout.attention_backend=_native_math", "model.attention_backend=native"])
    found = []
    for model in (config.rollout_model, config.model):
        transformer = FlowModel.load(model, "cpu", transformer=True).transformer
        found.append({block.attn.processor._attention_backend.value for block in transformer.transformer_blocks})
    assert found == [{"_native_math"}, {"native"}]
