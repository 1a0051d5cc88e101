"""The last words of a run: where its results are, how to load them, and the commands that go on from there."""

from g2rpo_ray.config import Config
from g2rpo_ray.files import resolve
from g2rpo_ray.record.storage import Folder


def next_steps(config: Config, run: Folder, done: int) -> str:
    """The lines that end a run with `done` iterations behind it."""
    settings, lora, model = run / "config.yaml", run / "lora", config.model
    here = run.path is not None  # of object storage a file must be fetched first
    lines = [
        f"pictures:   {run / 'samples'}/{done:06d}.png",
        f"report:     {run / 'report.html'}",
        f"LoRA:       {lora}",
        "load it:    from diffusers import DiffusionPipeline",
        f'            pipeline = DiffusionPipeline.from_pretrained("{resolve(model.path)}")',
        f'            pipeline.load_lora_weights("{lora}")',
        f"try it:     python -m g2rpo_ray.demo --adapter {run}",
    ]
    if here:
        more = f"--set iterations={done + config.iterations}"
        lines += [
            f"compare:    python -m g2rpo_ray.evaluate --config {settings} --adapter {config.name}={lora} --seeds 8",
            f"go on:      python -m g2rpo_ray.run --config {settings} {more}",
        ]
    return "\n" + "\n".join(lines)
