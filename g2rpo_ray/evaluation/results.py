"""The output of an evaluation: tables and grids of images."""

from dataclasses import asdict

import numpy as np

from g2rpo_ray.analysis.grid import picture_grid
from g2rpo_ray.analysis.statistics import AdapterRow, row
from g2rpo_ray.analysis.tables import to_csv, to_markdown
from g2rpo_ray.data.pictures import shown_sources
from g2rpo_ray.evaluation.plan import Column, EvaluationPlan
from g2rpo_ray.evaluation.scores import ScoreBook
from g2rpo_ray.runs.storage import replace_text
from g2rpo_ray.runs.tracking import to_json
from g2rpo_ray.types import FloatArray


def make_rows(plan: EvaluationPlan, book: ScoreBook) -> list[AdapterRow]:
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


def write_results(plan: EvaluationPlan, book: ScoreBook) -> str:
    """Writes table.md, table.csv, table.json and the grids; returns the Markdown."""
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
    size = plan.config.model.height, plan.config.model.width
    sources = shown_sources(shown, plan.metadata, size)
    for steps in plan.steps if shown else ():
        grid = {"source": sources} if sources else {}
        grid |= {c.adapter.name: [book.picture(plan.cell(c, steps, prompt)) for prompt in shown] for c in plan.columns}
        picture_grid(plan.folder / f"grid-{steps}.png", shown, grid, plan.config.model.frames)
    return f"{markdown}\nwritten to {plan.folder}: table.md, table.csv, table.json" + (", grid-*.png" if shown else "")
