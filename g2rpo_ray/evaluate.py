"""Compares the base model and any number of adapters, by every reward, at several numbers of steps, on the same noise.

adapters × steps × prompts ─► cells ─► rollout actors ─► images ─► reward servers ─► scores.jsonl ─► tables and grids
"""

import argparse
import asyncio
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from actors.interrupt import Interrupt
from g2rpo_ray.comparison.adapters import Adapter, read_adapters
from g2rpo_ray.comparison.scorebook import Cell, ScoreBook
from g2rpo_ray.comparison.statistics import Row, row
from g2rpo_ray.comparison.tables import to_csv, to_markdown
from g2rpo_ray.config import Config, load_config
from g2rpo_ray.data import read_records
from g2rpo_ray.files import resolve
from g2rpo_ray.launch.command import INTERRUPTED, INVALID, fail
from g2rpo_ray.launch.preflight import check_models, check_prompts, fit_batches, open_run
from g2rpo_ray.record.heldout import picture_grid
from g2rpo_ray.record.storage import Folder, replace_text
from g2rpo_ray.record.tracking import to_json
from g2rpo_ray.types import FloatArray, Images, Metadata, SampleUnit

BLOCK = 64  # prompts whose embeddings are in the object store at once: 256 MB for FLUX


@dataclass(frozen=True, slots=True)
class Column:
    """The base (version 0) or an adapter: a row of the tables, a column of the grids."""

    adapter: Adapter
    version: int
    share: float  # of the steps that the adapter makes
    key: str  # digest of all that its scores depend on, but steps, prompt and its metadata


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, on what, and where it goes."""

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


def make_plan(options: argparse.Namespace) -> Plan:
    """Read and check everything that the command line names.

    Raises:
        ValueError: one line that says what was given and what is allowed.
    """
    given = load_config(options.config, options.set)
    config = _without_training(given)
    check_models(config)
    config = fit_batches(config)
    records = read_records(
        options.prompts or given.data.heldout_prompts, "--prompts" if options.prompts else "data.heldout_prompts"
    )
    check_prompts(config, records)
    steps = tuple(dict.fromkeys(options.steps or [config.sampler.steps]))
    seeds = config.evaluation.seeds if options.seeds is None else options.seeds
    shown = config.evaluation.grid_prompts if options.grid is None else options.grid
    for option, value, least in (("steps", min(steps), 1), ("seeds", seeds, 1), ("grid", shown, 0)):
        if value < least:
            raise ValueError(f"--{option}: {value} given; must be a whole number from {least} up")
    if not 0 <= options.hybrid <= 1:
        raise ValueError(f"--hybrid: {options.hybrid:g} given; must be a share of the steps, from 0 to 1")
    settings = _settings(config, seeds)
    columns = tuple(
        _column(version, adapter, config, settings, options.hybrid)
        for version, adapter in enumerate(read_adapters(options.adapter, config))
    )
    folder = Path(options.output).expanduser() if options.output else (open_run(given) / "evaluation").path
    if folder is None:
        raise ValueError(f"--output: give a folder of this machine; the configuration's output is {given.output}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: {folder} is not a folder; name one, or one that is to be made")
    return Plan(config, columns, tuple(records), records, steps, seeds, shown, folder)


def _without_training(config: Config) -> Config:
    """The configuration without what an evaluation has no use for, so that nothing of it is asked for."""
    encoded = open_run(config) / "embeddings"
    embeddings = str(encoded) if config.data.embeddings is None and encoded.names() else config.data.embeddings
    changes = {
        "data": config.data.model_copy(update={"embeddings": embeddings}),  # what a run has encoded already
        "lora": config.lora.model_copy(update={"initial": None}),
        "learner": config.learner.model_copy(update={"resources": {}}),
    }
    return config.model_copy(update=changes)


def _settings(config: Config, seeds: int) -> dict[str, Any]:
    """What scores depend on, beside the adapter, steps and prompt: settings, and the state of the files they name."""
    rollout = config.rollout
    return {
        "seeds": seeds,
        "shift": config.sampler.shift,
        "guidance": config.evaluation.guidance,
        "model": config.model.model_dump(mode="json"),
        "pipeline": _stamp(config.model.path),
        "rollout": [rollout.device, rollout.threads, rollout.micro_batch, rollout.decode_batch, rollout.compile],
        "rewards": {
            name: [
                *(reward.kind, reward.options, reward.batch_size, [_stamp(value) for value in reward.options.values()]),
                *([reward.runtime_env] if reward.runtime_env else []),  # other packages may give other scores
            ]
            for name, reward in config.all_rewards.items()
        },
    }


def _stamp(value: Any) -> list[Any]:
    """Size and time of the file, or of all files in the folder, that a setting names."""
    path = Path(resolve(value)) if isinstance(value, str) and value else None
    if path is None or not path.exists():
        return []
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _column(version: int, adapter: Adapter, config: Config, settings: Mapping[str, Any], share: float) -> Column:
    from g2rpo_ray.models import describe

    own: dict[str, Any] = {}
    if version:
        lora = config.lora.model_dump(mode="json")
        own = {"lora": lora, "share": share, "checksum": describe(adapter.state, 0).checksum}
    return Column(adapter, version, share if version else 1.0, _digest(settings, own))


def _digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


async def sample(plan: Plan, book: ScoreBook, missing: Sequence[Sequence[Cell]]) -> int:
    """Sample and score what the book lacks, block by block; the exit status."""
    from actors.evaluation import Evaluator
    from actors.system import open_system

    total, left = len(plan.prompts) * len(plan.places()), sum(map(len, missing))
    states = {column.version: column.adapter.state for column in plan.columns}
    interrupt = Interrupt()
    with tqdm(total=total, initial=total - left, unit="unit", desc="evaluate", dynamic_ncols=True, disable=None) as bar:

        def keep(cell: Cell, scores: dict[str, FloatArray], picture: Images | None) -> None:
            book.add(cell, scores, picture)
            bar.update()

        async with open_system(Evaluator, plan.config, plan.metadata, Folder(plan.folder)) as evaluator:
            bar.write(f"{left} of {total} units to sample, each one policy on one prompt at one number of steps")
            going = await interrupt.unless(evaluator.start_evaluation(plan.prompts, states, bar.write))
            for block in missing:
                going = going and await interrupt.unless(evaluator.score(block, keep))
    if going:
        return 0
    done = total - sum(not book.has(cell) for block in missing for cell in block)
    print(f"stopped: {done} of {total} units are scored and kept; the same command goes on from there")
    return INTERRUPTED


def make_rows(plan: Plan, book: ScoreBook) -> list[Row]:
    """The comparison, by steps, then adapter, then reward."""

    def scores(column: Column, steps: int, reward: str) -> FloatArray:
        return np.stack([book.scores(plan.cell(column, steps, prompt), reward) for prompt in plan.prompts])

    base = plan.columns[0]
    return [
        row(
            *(steps, column.adapter.name, reward, reward in plan.config.rewards, scores(column, steps, reward)),
            None if column is base else scores(base, steps, reward),
        )
        for column, steps in plan.places()
        for reward in plan.config.all_rewards
    ]


def write_results(plan: Plan, book: ScoreBook) -> str:
    """Write table.md, table.csv, table.json and the grids; the Markdown."""
    rows = make_rows(plan, book)
    hybrid = plan.columns[-1].share
    adapters = [{"name": c.adapter.name, "path": c.adapter.path, "key": c.key} for c in plan.columns]
    about = {"prompts": len(plan.prompts), "seeds": plan.seeds, "hybrid": hybrid, "adapters": adapters}
    note = f"{len(plan.prompts)} prompts × {plan.seeds} seeds, the same noise for all; 95 % t intervals over prompts."
    if hybrid < 1:
        note += f" Adapters make the first {hybrid:.0%} of the steps, the base the rest."
    markdown = f"{note}\n\n{to_markdown(rows)}\n"
    replace_text(plan.folder / "table.md", markdown)
    replace_text(plan.folder / "table.csv", to_csv(rows))
    replace_text(plan.folder / "table.json", to_json({**about, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")
    shown = plan.prompts[: plan.shown]
    for steps in plan.steps if shown else ():
        grid = {c.adapter.name: [book.picture(plan.cell(c, steps, prompt)) for prompt in shown] for c in plan.columns}
        picture_grid(plan.folder / f"grid-{steps}.png", shown, grid)
    return f"{markdown}\nwritten to {plan.folder}: table.md, table.csv, table.json" + (", grid-*.png" if shown else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from actors.cluster import leave

    try:
        return leave(_main(arguments))
    except KeyboardInterrupt:  # before sampling, or after it
        print("stopped: the same command goes on with what is scored")
        return INTERRUPTED


def _main(arguments: Sequence[str] | None) -> int:
    with ExitStack() as stack:
        try:
            options = make_parser().parse_args(arguments)
            plan = make_plan(options)
            book = ScoreBook(plan.folder)
            missing = [[cell for cell in block if not book.has(cell)] for block in plan.blocks()]
            if any(missing):
                from actors.cluster import check_resources, cluster

                stack.enter_context(cluster(options.address))
                check_resources(plan.config)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return INVALID
        plan.folder.mkdir(parents=True, exist_ok=True)
        try:
            status = asyncio.run(sample(plan, book, [block for block in missing if block])) if any(missing) else 0
        except asyncio.CancelledError:  # a second signal
            return INTERRUPTED
        except Exception as error:
            return fail(Folder(plan.folder), error)
    if not status:
        print(write_results(plan, book))
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = _Parser(
        prog="python -m g2rpo_ray.evaluate",
        description="Compare the base model and adapters: rewards, steps, seeds.",
        epilog="example: python -m g2rpo_ray.evaluate --config runs/a/config.yaml --adapter a=runs/a/lora --seeds 8",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, as of the run; default: the quickstart")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument(
        "--adapter", metavar="NAME=PATH", action="extend", nargs="+", default=[], help="LoRA to compare, file or folder"
    )
    parser.add_argument("--prompts", metavar="FILE", help="default: data.heldout_prompts")
    parser.add_argument("--steps", metavar="T", type=int, nargs="+", help="sampling steps; default: sampler.steps")
    parser.add_argument("--seeds", metavar="N", type=int, help="samples of a prompt; default: evaluation.seeds")
    parser.add_argument(
        "--hybrid", metavar="FRACTION", type=float, default=1.0, help="adapters for the first part of the steps only"
    )
    parser.add_argument("--grid", metavar="N", type=int, help="prompts in the grids; default: evaluation.grid_prompts")
    parser.add_argument("--output", metavar="DIR", help="default: <output>/<name>/evaluation of the configuration")
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else one on this machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
