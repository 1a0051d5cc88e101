"""The twin of a model: a pipeline of the same classes, two layers deep and WIDTH wide, with random weights.

It is made of the model's configuration files alone. Latents have as many channels, and a latent as many pixels, as the
model's own; the scheduler is the model's. So is a tokenizer whose files are here; others read letters.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.models.base import FlowModel, describe_model
from g2rpo_ray.models.pipeline import SECOND, is_part
from g2rpo_ray.rehearsal.parts import ENCODERS, TOKENIZERS, WIDTH, randomise

FLUX = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4)}  # fmt: skip
TRANSFORMERS: dict[str, Mapping[str, Any]] = {
    "FluxTransformer2DModel": {**FLUX, "pooled_projection_dim": WIDTH},
    "ChromaTransformer2DModel": {
        **FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    },
    "Flux2Transformer2DModel": {  # its text is three layers of the encoder
        **FLUX, "attention_head_dim": 16, "joint_attention_dim": 3 * WIDTH, "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 16,
    },
    "SD3Transformer2DModel": {
        "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16, "pooled_projection_dim": WIDTH, "pos_embed_max_size": 64,
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    "QwenImage21Transformer2DModel": {
        "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    "ZImageTransformer2DModel": {
        "n_layers": 2, "n_refiner_layers": 1, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": WIDTH,
        "axes_dims": (4, 6, 6),
    },
    "Lumina2Transformer2DModel": {
        "num_layers": 2, "num_refiner_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "num_kv_heads": 1,
        "multiple_of": 8, "cap_feat_dim": WIDTH, "axes_dim_rope": (4, 4, 4),
    },
    "WanTransformer3DModel": {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": WIDTH,
    },
}  # fmt: skip
"""By class, what of its configuration is smaller in the twin; heads, axes and widths agree."""
VAES: Mapping[str, Any] = {
    "layers_per_block": 1, "norm_num_groups": 4, "base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1
}  # fmt: skip
"""Of any VAE, what of its configuration is smaller, if it has such a key."""


def write_twin(config: ModelConfig, folder: Path) -> int:
    """Write the twin of a model whose configuration files are on this machine; how many parameters its transformer has.

    The same files make the same weights. They are float32.

    Raises:
        ValueError: one line; the files cannot be read, or have a class of which no small one is known.
    """
    family, description = describe_model(config)
    source = Path(config.location)
    index = json.loads((source / "model_index.json").read_text())
    parts = {name: value[1] for name, value in index.items() if is_part(value)}
    options = {name: value for name, value in index.items() if name not in parts and not name.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = _transformer(family, description.network)
        made = {
            "scheduler": getattr(diffusers, parts["scheduler"]).from_pretrained(source / "scheduler"),
            "transformer": transformer,
            **({SECOND: _transformer(family, description.network)} if SECOND in description.parts else {}),
            "vae": _vae(family, description.autoencoder),
            **_text_parts(source, {name: parts[name] for name in description.text_parts}),
        }
        pipeline = family.pipeline_class(**{**dict.fromkeys(parts), **options, **made})
    pipeline.save_pretrained(folder)
    return sum(parameter.numel() for parameter in transformer.parameters())


def _transformer(family: type[FlowModel], given: Mapping[str, Any]) -> Any:
    smaller = dict(_known(TRANSFORMERS, family.transformer_class.__name__))
    if given.get("dual_attention_layers"):
        smaller["dual_attention_layers"] = (0,)
    transformer = family.transformer_class.from_config({**given, **smaller})
    randomise(transformer, 1.5)
    return transformer


def _vae(family: type[FlowModel], given: Mapping[str, Any]) -> Any:
    known = inspect.signature(family.vae_class).parameters
    smaller = {key: value for key, value in VAES.items() if key in known}
    widths = {"block_out_channels": 8, "dim_mult": 1}
    smaller |= {key: [width] * len(given[key]) for key, width in widths.items() if key in given}
    return family.vae_class.from_config({**given, **smaller})


def _text_parts(source: Path, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Tokenizers, and encoders that read what they make, by the names of the pipeline's parts."""
    made: dict[str, Any] = {}
    for name, kind in kinds.items():
        if not name.startswith("text_encoder"):
            own, small = source / name, _known(TOKENIZERS, kind.removesuffix("Fast"))
            made[name] = getattr(transformers, kind).from_pretrained(own) if own.is_dir() else small()
    clips = sum(kind.startswith("CLIP") for kind in kinds.values() if "Tokenizer" not in kind)
    for name, kind in kinds.items():
        if name.startswith("text_encoder"):
            tokenizer = made.get(name.replace("text_encoder", "tokenizer")) or made["processor"]
            made[name] = _known(ENCODERS, kind)(tokenizer, WIDTH // max(1, clips))
    return made


def _known(table: Mapping[str, Any], kind: str) -> Any:
    if kind not in table:
        raise ValueError(f"model.path: it has a {kind}, which has no small version; supported are {', '.join(table)}")
    return table[kind]
