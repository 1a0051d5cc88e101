"""The summary that a run prints at its end: files, how to load the LoRA, next commands."""

import os

from g2rpo_ray.config import Config
from g2rpo_ray.runs.storage import Folder


def next_steps(config: Config, run: Folder, done: int) -> str:
    """The summary of a run with `done` finished iterations."""
    here = run.path is not None  # else the run is in object storage
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    lora = "lora" if here and in_pod else run / "lora"
    lines = [
        f"pictures:   {run / 'samples'}/{done:06d}.png",
        f"report:     {run / 'report.html'}",
        f"LoRA:       {run / 'lora'}",
    ]
    if here and in_pod:  # its paths do not exist outside, and its image has no gradio for a demo
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
    """The commands to run next on this machine."""
    lines = [f"try it:     python -m g2rpo_ray.demo --adapter {run}"]
    if run.path is not None:
        settings, more = run / "config.yaml", f"--set iterations={done + config.iterations}"
        adapter = f"{config.name}={run / 'lora'}"
        lines += [
            f"compare:    python -m g2rpo_ray.evaluate --config {settings} --adapter {adapter} --seeds 8",
            f"continue:   python -m g2rpo_ray.run --config {settings} {more}",
        ]
    return lines
