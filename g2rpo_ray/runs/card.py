"""Prepares an adapter for publication: its files, pictures, and a model card with method, settings and scores."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from g2rpo_ray.analysis.grid import picture_grid
from g2rpo_ray.analysis.statistics import compare_all
from g2rpo_ray.analysis.tables import before_and_after, markdown_table
from g2rpo_ray.runs.reader import Run
from g2rpo_ray.runs.storage import Folder

PICTURES, SETTINGS = "pictures.png", "settings.yaml"
PRIVATE = ("output", "tracking", "runtime_env", "options", "embeddings")
"""Settings of the machine, and those that may be private."""


def write_card(run: Run, folder: Path, repository: str) -> list[str]:
    """Write all files of a repository of the run's adapter; their names.

    Raises:
        ValueError: one line; the run has no adapter yet.
    """
    source = Folder(run.lora)
    if not source.names():
        raise ValueError(f"{run.lora}: there is no adapter; a run writes one at its first checkpoint")
    with source.reading() as lora:
        shutil.copytree(lora, folder, dirs_exist_ok=True)
    (folder / SETTINGS).write_text(yaml.safe_dump(_published(run.settings), sort_keys=False))
    if pictured := _pictures(run):
        picture_grid(folder / PICTURES, *pictured, run.frames)
    (folder / "README.md").write_text(_card(run, repository, bool(pictured)))
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _card(run: Run, repository: str, pictured: bool) -> str:
    """The model card, in Markdown with the hub's header."""
    settings = _published(run.settings)
    base, revision = settings["model"]["path"], settings["model"]["revision"]
    header = {"library_name": "diffusers", "pipeline_tag": "text-to-image",
              "tags": ["lora", "reinforcement-learning", "g2rpo_ray", str(settings["method"])]}  # fmt: skip
    if base.count("/") == 1:
        header["base_model"] = base
    rewards = ", ".join(f"{name} (weight {reward['weight']:g})" for name, reward in settings["rewards"].items())
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {run.name}",
        f"A LoRA for `{base}`{f' at revision `{revision}`' if revision else ''}, trained by reinforcement learning "
        f"with g2rpo_ray: method `{settings['method']}`, {run.done} iterations of "
        f"{settings['data']['prompts_per_iteration']} prompts, seed {settings['seed']}. Rewards trained on: {rewards}.",
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("{repository}")\n```',
        *_scores(run),
        *([f"## Pictures\n\n![held-out prompts, before and after training]({PICTURES})"] if pictured else []),
        f"## Settings\n\nAll but those of the machine: [{SETTINGS}]({SETTINGS}).\n\n{_settings(settings)}",
    ]
    return "\n\n".join(parts) + "\n"


def _published(settings: Any) -> Any:
    """The settings without PRIVATE ones, wherever they stand, and paths of this machine by their last part."""
    if isinstance(settings, str) and settings.startswith(("/", "~", ".")):
        return Path(settings).name
    if not isinstance(settings, Mapping):
        return settings
    return {key: _published(value) for key, value in settings.items() if key not in PRIVATE}


def _scores(run: Run) -> list[str]:
    """The held-out comparison, where there are two evaluations."""
    if len(run.evaluations) < 2:
        return []
    first, last = min(run.evaluations), max(run.evaluations)
    table = before_and_after(compare_all(run.evaluations[first].scores, run.evaluations[last].scores), run.trained)
    about = f"Iteration {first} and {last}, {len(run.evaluations[last].prompts)} held-out prompts, the same noise."
    return [f"## Scores\n\n{about}\n\n{table}"]


def _pictures(run: Run) -> tuple[list[str], dict[str, Any]] | None:
    """Captions and columns of the grid: the first and the last evaluation; None without pictures."""
    if not run.evaluations:
        return None
    first, last = min(run.evaluations), max(run.evaluations)
    shown = len(run.evaluations[last].pictures)
    columns = {"source": run.sources} if run.sources else {}
    columns |= {"before" if first == 0 else f"iteration {first}": run.evaluations[first].pictures}
    columns |= {f"iteration {last}": run.evaluations[last].pictures}
    return (list(run.evaluations[last].prompts[:shown]), columns) if shown else None


def _settings(settings: Mapping[str, Any]) -> str:
    learner, sampler, lora = settings["learner"], settings["sampler"], settings["lora"]
    rows = {
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}", "learning rate": f"{learner['lr']:g}",
        "objective": learner["objective"], "kernel": f"{sampler['kernel']}, η {sampler['eta']:g}",
        "sampling steps": sampler["steps"], "branch steps": sampler["branch_steps"], "strides": sampler["strides"],
        "group size": sampler["group_size"], "size": f"{settings['model']['width']} × {settings['model']['height']}",
    }  # fmt: skip
    return markdown_table(["setting", "value"], rows.items())
