"""Prints the memory table of docs/tuning.md, for FLUX.1-dev: from configuration files, without weights or a device."""

import json
import tempfile
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from g2rpo_ray.config import load_config
from g2rpo_ray.models.estimate import LIBRARIES, fitting_micro_batch, rollout_memory, with_micro_batch

VAE = {
    "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip


def write_flux(folder: Path) -> None:
    """The configuration files of FLUX.1-dev: its transformer's are the defaults of diffusers."""
    import torch

    with torch.device("meta"):
        FluxTransformer2DModel(guidance_embeds=True).save_config(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_config(folder / "scheduler")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(VAE))
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # not looked at
    parts |= {part: ["transformers", "AutoModel"] for part in texts}
    index = {"_class_name": "FluxPipeline", **parts, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def main() -> None:
    print("| pixels | device | weights GiB | velocity + decode GiB at micro_batch 1 | largest micro_batch that fits |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_flux(Path(folder))
        for size in (512, 720, 1024):
            sets = [f"model.path={folder}", f"model.height={size}", f"model.width={size}"]
            config = with_micro_batch(load_config("flux_hps", [*sets, "rollout.decode_batch=1"]), 64)
            one = {part: needed / 2**30 for part, needed in rollout_memory(with_micro_batch(config, 1)).items()}
            for memory in (24, 48, 80):
                fits = fitting_micro_batch(config, memory * 2**30) or "none"
                work = one["velocity"] + one["decode"]
                print(f"| {size} | {memory} GiB | {one['weights']:.1f} | {work:.1f} | {fits} |")
    print(f"\nBeside {LIBRARIES / 2**30:.0f} GiB for a GPU's context and libraries.")


if __name__ == "__main__":
    main()
