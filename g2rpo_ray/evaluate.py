"""Compares the base model and any number of adapters, by every reward, at several numbers of steps, on the same noise.

adapters × steps × prompts ─► cells ─► rollout actors ─► images ─► reward servers ─► scores.jsonl ─► tables and grids
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from actors.interrupt import Interrupt
from g2rpo_ray.comparison.plan import Column, Plan, make_plan
from g2rpo_ray.comparison.scorebook import Cell, ScoreBook
from g2rpo_ray.comparison.statistics import Row, row
from g2rpo_ray.comparison.tables import to_csv, to_markdown
from g2rpo_ray.launch.command import INTERRUPTED, INVALID, fail
from g2rpo_ray.record.heldout import picture_grid
from g2rpo_ray.record.storage import Folder, replace_text
from g2rpo_ray.record.tracking import to_json
from g2rpo_ray.types import FloatArray, Images


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
