"""What each published model takes, counted from its shape alone: no weights, no device.

python benchmarks/models.py                       all, at 1024 px
python benchmarks/models.py --models sd35_m --size 512 --ranks 8
"""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

from common import Row, parser, report

import torch  # isort: skip  # common makes the packages importable
import diffusers

from g2rpo_ray.config import Config, load_config

DIFFUSERS_VAE = {
    "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SD35 = {"qk_norm": "rms_norm", "joint_attention_dim": 4096, "sample_size": 128}
KLEIN = {"num_single_layers": 20, "num_layers": 5, "num_attention_heads": 24, "joint_attention_dim": 7680}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux_dev": ("FluxPipeline", {"guidance_embeds": True}),
    "sd35_m": ("StableDiffusion3Pipeline", SD35 | {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13))}),
    "sd35_l": ("StableDiffusion3Pipeline", SD35 | {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}),
    "qwen_image": ("QwenImagePipeline", {}),
    "qwen_image_21": ("QwenImage21Pipeline", {}),
    "z_image": ("ZImagePipeline", {}),
    "flux2_klein_4b": ("Flux2KleinPipeline", KLEIN | {"guidance_embeds": False}),
    "flux2_klein_9b": ("Flux2KleinPipeline", KLEIN | {
        "guidance_embeds": False, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
        "joint_attention_dim": 12288}),
    "flux2_dev": ("Flux2Pipeline", {}),
    "chroma": ("ChromaPipeline", {}),
    "lumina2": ("Lumina2Pipeline", {"cap_feat_dim": 2304}),
}  # fmt: skip
"""Pipeline class, and what differs from the defaults of diffusers' transformer."""


def write_shape(name: str, directory: Path) -> Path:
    """A pipeline's configuration files without weights."""
    from g2rpo_ray.models.base import FAMILIES

    kind, changes = SHAPES[name]
    family = __import__(f"g2rpo_ray.models.{FAMILIES[kind]}", fromlist=["Model"]).Model
    parts = {"transformer": family.transformer_class, "vae": family.vae_class}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    with torch.device("meta"):
        vae = DIFFUSERS_VAE if family.vae_class is diffusers.AutoencoderKL else {}
        configs = {"transformer": dict(family.transformer_class(**changes).config),
                   "vae": dict(family.vae_class(**vae).config)}  # fmt: skip
    names = inspect.signature(getattr(diffusers, kind).__init__).parameters
    text = [
        name for name in names if "encoder" in name or "tokenizer" in name or name in ("feature_extractor", "processor")
    ]
    index: dict[str, Any] = {"_class_name": kind} | {part: ["transformers", "PreTrainedModel"] for part in text}
    index |= {part: ["diffusers", made.__name__] for part, made in parts.items()}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    for part, config in configs.items():
        (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / part / "config.json").write_text(json.dumps(config, default=str))
    scheduler.save_pretrained(directory / "scheduler")
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def row(name: str, given: Any, config: Config) -> Row:
    from g2rpo_ray.models.estimate import fits, rollout_memory

    with tempfile.TemporaryDirectory() as folder:
        write_shape(name, Path(folder))
        guided = SHAPES[name][0] not in ("FluxPipeline", "Flux2Pipeline", "QwenImage21Pipeline")
        changes: dict[str, Any] = dict.fromkeys(("max_sequence_length", "guidance_scale"))
        changes |= {"path": folder, "dtype": "bfloat16", "height": given.size, "width": given.size}
        changes["negative_prompt"] = "" if guided else None
        config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
        weights = rollout_memory(config)["weights"]
        told = {fit.gigabytes: fit for fit in fits(config)}
    words = {
        f"{size} GB": f"{fit.latents} / {fit.states}" + (" gc" if fit.checkpointed and fit.states else "")
        + (" z3" if fit.zero_stage == 3 and fit.states else "")
        for size, fit in told.items()
    }  # fmt: skip
    return {"model": name, "weights GB": weights / 1e9, **words}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--size", type=int, default=1024, help="pixels along an edge")
    options.add_argument("--ranks", type=int, default=8, help="of the learner, which ZeRO 3 spreads the weights over")
    given = options.parse_args()
    if given.quick:
        given.models, given.size = ["lumina2"], 256
    config = load_config(
        None, [f"learner.ranks={given.ranks}", "lora.rank=64", "lora.targets=null", "rollout.decode_batch=1"]
    )
    rows = [row(name, given, config) for name in given.models]
    note = (
        "Largest micro-batch of a rollout actor / states of a learner rank, by estimate: bfloat16, LoRA of rank 64, "
        "guidance where the model has it. gc: with gradient checkpointing; z3: and ZeRO 3."
    )
    report(f"Memory by model, {given.size} px, {given.ranks} ranks", rows, given.json, [note])


if __name__ == "__main__":
    main()
