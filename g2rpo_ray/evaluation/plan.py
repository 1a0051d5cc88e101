"""The plan of an evaluation: adapters, prompts, steps and output, checked before the start."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2rpo_ray.config import Config
from g2rpo_ray.config.completions import CompletionsConfig
from g2rpo_ray.data import read_records
from g2rpo_ray.evaluation.adapters import Adapter, read_adapters
from g2rpo_ray.paths import local_path, path_fault, resolve
from g2rpo_ray.preflight import check_models, check_prompts, fit_batches, open_run, require_lasting
from g2rpo_ray.types import Cell, Metadata, SampleUnit

BLOCK = 64  # prompts whose embeddings are in the object store at once: 256 MB for FLUX
BOUNDS = {"steps": (1, 1000), "seeds": (1, 1024), "grid": (0, 1024)}  # as those of the settings


@dataclass(frozen=True, slots=True)
class Column:
    """The base (version 0) or an adapter: a row of the tables, a column of the grids."""

    adapter: Adapter
    version: int
    share: float  # of the steps that the adapter makes
    key: str  # digest of all that its scores depend on, but steps, prompt and its metadata


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Adapters, prompts, steps and output of an evaluation."""

    config: Config
    columns: tuple[Column, ...]
    prompts: tuple[str, ...]
    metadata: Mapping[str, Metadata]  # by prompt
    steps: tuple[int, ...]
    seeds: int
    shown: int  # prompts in the grids
    folder: Path

    def cell(self, column: Column, steps: int, prompt: str) -> Cell:
        unit = SampleUnit(prompt, tuple(range(self.seeds)), steps, column.share)
        known = self.metadata[prompt]
        key = _digest(column.key, known) if known else column.key
        return Cell(key, column.version, unit, shown=prompt in self.prompts[: self.shown])

    def blocks(self) -> Iterator[list[Cell]]:
        """All cells, some prompts at a time; within a block those of one adapter and number of steps together."""
        for at in range(0, len(self.prompts), BLOCK):
            block = self.prompts[at : at + BLOCK]
            yield [self.cell(*place, prompt) for place in self.places() for prompt in block]

    def places(self) -> list[tuple[Column, int]]:
        return [(column, steps) for steps in self.steps for column in self.columns]


def make_plan(
    given: Config,
    adapters: Mapping[str, str | os.PathLike[str]] | Sequence[str] = (),
    *,
    steps: Sequence[int] | None = None,
    seeds: int | None = None,
    hybrid: float = 1.0,
    grid: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> EvaluationPlan:
    """Reads and checks all inputs of an evaluation; see `evaluate` for the arguments.

    Raises:
        ValueError: one line with the option, the given value and the allowed ones.
    """
    config = _without_training(given)
    check_models(config)
    config = fit_batches(config)
    records = read_records(given.data.heldout_prompts, "data.heldout_prompts", config.model.sources)
    check_prompts(config, records)
    steps = tuple(dict.fromkeys(steps or [config.sampler.steps]))
    seeds = config.evaluation.seeds if seeds is None else seeds
    grid = config.evaluation.grid_prompts if grid is None else grid
    for option, values in (("steps", steps), ("seeds", (seeds,)), ("grid", (grid,))):
        lowest, highest = BOUNDS[option]
        for value in values:
            if not lowest <= value <= highest:
                raise ValueError(f"--{option}: {value} given; must be a whole number from {lowest} to {highest}")
    if not 0 <= hybrid <= 1:
        raise ValueError(f"--hybrid: {hybrid:g} given; must be a share of the steps, from 0 to 1")
    settings = _settings(config, seeds)
    columns = tuple(
        _column(version, adapter, config, settings, hybrid)
        for version, adapter in enumerate(read_adapters(adapters, config))
    )
    folder = local_path(os.fspath(output)) if output else (open_run(given) / "evaluation").path
    require_lasting("--output", str(output or given.output))
    if folder is None:
        raise ValueError(f"--output: missing, and output={given.output} is not local; give a folder of this machine")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: {folder} is not a folder; give a folder, or a new name")
    return EvaluationPlan(config, columns, tuple(records), records, steps, seeds, grid, folder)


def _without_training(config: Config) -> Config:
    """The configuration without settings of training, so that an evaluation needs no resources for them."""
    encoded = open_run(config) / "embeddings"
    embeddings = str(encoded) if config.data.embeddings is None and encoded.names() else config.data.embeddings
    changes = {
        "data": config.data.model_copy(update={"embeddings": embeddings}),  # prompts that a run has encoded
        "lora": config.lora.model_copy(update={"initial": None}),
        "learner": config.learner.model_copy(update={"resources": {}}),
        "rollout": config.rollout.model_copy(update={"completions": CompletionsConfig()}),
    }
    return config.model_copy(update=changes)


def _settings(config: Config, seeds: int) -> dict[str, Any]:
    """Inputs of scores other than adapter, steps and prompt: settings, and size and time of their files."""
    rollout = config.rollout
    return {
        "seeds": seeds,
        "shift": config.sampler.shift,
        "guidance": config.evaluation.guidance,
        "model": config.rollout_model.model_dump(mode="json"),
        "pipeline": _stamp(config.model.path),
        "rollout": [
            *(rollout.device, rollout.threads, rollout.micro_batch, rollout.decode_batch, rollout.compile),
            *([rollout.runtime_env] if rollout.runtime_env else []),
        ],
        "rewards": {
            name: [
                *(reward.kind, reward.model_dump(mode="json")["options"], reward.device, reward.batch_size),
                [_stamp(value) for value in reward.options.values()],
                *([reward.runtime_env] if reward.runtime_env else []),  # other packages may give other scores
            ]
            for name, reward in config.all_rewards.items()
        },
    }


def _stamp(value: Any) -> list[Any]:
    """Name, size and time of the file, or of all files in the folder, that a setting names."""
    path = Path(resolve(value)) if isinstance(value, str) and not path_fault(value) else None
    if path is None or not path.exists():
        return []
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _column(version: int, adapter: Adapter, config: Config, settings: Mapping[str, Any], share: float) -> Column:
    from g2rpo_ray.models import manifest_of

    own: dict[str, Any] = {}
    if version:
        lora = config.lora.model_dump(mode="json")
        own = {"lora": lora, "share": share, "checksum": manifest_of(adapter.state, 0).checksum}
    return Column(adapter, version, share if version else 1.0, _digest(settings, own))


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
