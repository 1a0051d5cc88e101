"""Rebuilds the quickstart's pipeline and preference model: `python -m g2rpo_ray.quickstart.build [--output DIR]`."""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from numpy.typing import NDArray

from g2rpo_ray.quickstart import PIPELINE_DIR, PREFERENCE_ARCHITECTURE, PREFERENCE_CHECKPOINT, ROOT
from g2rpo_ray.quickstart.measure import report
from g2rpo_ray.quickstart.preference import save_preference, train_preference, training_images
from g2rpo_ray.quickstart.pretrain import (
    CAPTIONS,
    mislabel_shapes,
    new_pipeline,
    rendered_dataset,
    sample,
    train_autoencoder,
    train_transformer,
)

AUTOENCODER_STEPS = 2000
TRANSFORMER_STEPS = 800
PREFERENCE_STEPS = 3000
MISLABELLED = 0.35  # of the pre-training captions name a random shape, as web captions do: what RL puts right
WATCHED = (250, 350, 450, 550)  # pre-training steps whose malformed pictures the preference model learns from


def build_pipeline(directory: Path) -> tuple[FluxPipeline, NDArray[np.uint8]]:
    """Trains and saves the pipeline; also its own pictures, from before, at and after its final form."""
    torch.manual_seed(0)
    pipeline = new_pipeline()
    images, caption_index = rendered_dataset(per_caption=200, seed=0)
    train_autoencoder(pipeline.vae, images, AUTOENCODER_STEPS)
    torch.manual_seed(1)
    pictures: list[NDArray[np.uint8]] = []

    def watch(step: int, current: FluxPipeline) -> None:
        if step in WATCHED:
            pictures.append(sample(current, CAPTIONS * 8, seed=step, steps=6))

    train_transformer(pipeline, images, mislabel_shapes(caption_index, MISLABELLED), TRANSFORMER_STEPS, on_step=watch)
    for seed, steps in enumerate((3, 4, 6, 10, 10, 16)):
        pictures.append(sample(pipeline, CAPTIONS * 12, seed, steps))
    shutil.rmtree(directory, ignore_errors=True)
    pipeline.save_pretrained(directory)
    return pipeline, np.concatenate(pictures)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT, help="where to write (default: into the package)")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pipeline, generated = build_pipeline(output / PIPELINE_DIR.name)
    print(f"pipeline built in {time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(2)
    preference = train_preference(training_images(pipeline.vae, generated, seed=1), PREFERENCE_STEPS)
    save_preference(preference, output / PREFERENCE_CHECKPOINT.name, output / PREFERENCE_ARCHITECTURE.name)
    print(f"all built in {time.monotonic() - started:.0f} s", flush=True)
    report(output)


if __name__ == "__main__":
    main()
