"""The demo with a prompt."""

import numpy as np
import pytest
from diffusers import FluxPipeline

from g2rpo_ray.config import dump_config, load_config
from g2rpo_ray.models import export_lora, lora_shapes

PROMPT = "a blue square"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, as far as the demo needs it, with an adapter that changes pictures."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    config = load_config()
    (folder / "config.yaml").write_text(dump_config(config))
    rng = np.random.default_rng(0)
    shapes = lora_shapes(config.model, config.lora)
    state = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    export_lora(folder / "lora", state, config.lora, FluxPipeline)
    return folder
