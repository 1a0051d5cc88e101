"""Adapters and prompts for evaluations."""

import numpy as np
import pytest
from diffusers import FluxPipeline
from safetensors.numpy import load_file, save_file

from g2rpo_ray.config import load_config
from g2rpo_ray.models import export_lora, lora_shapes

PROMPTS = ("a red circle", "a blue star")


def random_state(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = lora_shapes(config.model, config.lora)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters and prompts, right and wrong."""
    folder = tmp_path_factory.mktemp("files")
    config = load_config()
    export_lora(folder / "lora", random_state(config), config.lora, FluxPipeline)
    export_lora(folder / "other", random_state(config, 1), config.lora, FluxPipeline)
    for name, changes in (("rank", {"rank": 4}), ("targets", {"targets": ("attn.to_q",)})):
        lora = config.lora.model_copy(update=changes)
        export_lora(folder / name, random_state(config.model_copy(update={"lora": lora})), lora, FluxPipeline)
    tensors = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    save_file(tensors, folder / "list.safetensors", {"lora_adapter_metadata": "[1]"})
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "scores.jsonl").mkdir()
    return folder
