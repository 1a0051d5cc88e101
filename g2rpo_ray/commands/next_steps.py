"""The last words of a run: where its results are, how to load them, and the commands that go on from there."""

import os

from g2rpo_ray.config import Config
from g2rpo_ray.runs.storage import Folder


def next_steps(config: Config, run: Folder, done: int) -> str:
    """The lines that end a run with `done` iterations behind it."""
    here = run.path is not None  # of object storage a file must be fetched first
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    lora = "lora" if here and in_pod else run / "lora"
    lines = [
        f"pictures:   {run / 'samples'}/{done:06d}.png",
        f"report:     {run / 'report.html'}",
        f"LoRA:       {run / 'lora'}",
    ]
    if here and in_pod:  # whose paths nobody has outside, and whose image has no gradio for a demo
        lines += [
            "copy it:    kubectl apply -f deploy/tools/files.yaml",
            "            kubectl wait --for=condition=Ready pod/g2rpo-files",
            f"            kubectl cp g2rpo-files:{run / 'lora'} ./lora",
            f"            kubectl cp g2rpo-files:{run / 'report.html'} ./report.html",
        ]
    lines += [
        "load it:    from diffusers import DiffusionPipeline",
        f'            pipeline = DiffusionPipeline.from_pretrained("{config.model.location}")',
        f'            pipeline.load_lora_weights("{lora}")',
    ]
    return "\n" + "\n".join(lines if in_pod else [*lines, *_commands(config, run, done)])


def _commands(config: Config, run: Folder, done: int) -> list[str]:
    """What can be run on this machine."""
    lines = [f"try it:     python -m g2rpo_ray.demo --adapter {run}"]
    if run.path is not None:
        settings, more = run / "config.yaml", f"--set iterations={done + config.iterations}"
        adapter = f"{config.name}={run / 'lora'}"
        lines += [
            f"compare:    python -m g2rpo_ray.evaluate --config {settings} --adapter {adapter} --seeds 8",
            f"go on:      python -m g2rpo_ray.run --config {settings} {more}",
        ]
    return lines
