"""Curves of held-out scores against cost, and grids of images."""

from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from g2rpo_ray.analysis.grid import picture_grid
from g2rpo_ray.analysis.svg import PALETTE, drawing
from g2rpo_ray.runs.storage import replace_text
from g2rpo_ray.study.plan import Plan
from g2rpo_ray.study.record import picture_file
from g2rpo_ray.study.rows import Results
from g2rpo_ray.study.schema import BASE
from g2rpo_ray.study.statistics import over_seeds

MAX_OPAQUE_BANDS = 6  # above this number of variants, bands are fainter
STYLES = list(product(("-", "--", ":"), PALETTE))  # for more variants than colours


def curves(results: Results, folder: Path) -> list[Path]:
    """Writes a figure for each table and reward: means over seeds, with bands of 95 % intervals. Returns the files."""
    made = []
    for table in results.plan.study.tables:
        variants = [variant for variant in results.variants(table) if variant != BASE]
        for reward in results.plan.rewards(table) if variants else ():
            made.append(folder / f"{table}-{reward}.svg")
            replace_text(made[-1], _curve(results, table, variants, reward))
    return made


def _curve(results: Results, table: str, variants: list[str], reward: str) -> str:
    faint, ends = 0.12 if len(variants) <= MAX_OPAQUE_BANDS else 0.06, []
    with drawing(6.4, 3.8) as made:
        for variant, (line, colour) in zip(variants, STYLES, strict=False):
            found = [results.curve(table, variant, run, "cost", reward) for run in results.runs(table, variant)]
            looks = min(len(costs) for costs, _ in found)
            cost = np.mean([costs[:looks] for costs, _ in found], axis=0)
            bands = [over_seeds([means[at] for _, means in found]) for at in range(looks)]
            (drawn,) = made.axes.plot(cost, [band.mean for band in bands], line, color=colour, label=variant)
            ends.append((bands[-1].mean, drawn))
            low, high = ([getattr(band, end) for band in bands] for end in ("low", "high"))
            made.axes.fill_between(cost, low, high, color=colour, alpha=faint, linewidth=0)
        trained = " (trained)" if reward in results.plan.trained(table) else ""
        made.axes.set(xlabel="cost: evaluations + learner states, in evaluations", ylabel=reward + trained)
        ranked = [drawn for _, drawn in sorted(ends, key=lambda end: -end[0])]  # in the order of the lines' ends
        made.axes.legend(handles=ranked, loc="center left", bbox_to_anchor=(1, 0.5))
    return made.svg


def pictures(plan: Plan, results: Results, folder: Path) -> list[Path]:
    """Writes a grid for each table whose images are on this machine: prompts down, base and variants across.

    Returns the files.
    """
    made = []
    for table in plan.study.tables:
        first = {variant: results.runs(table, variant)[0]["key"] for variant in results.variants(table)}
        files = {variant: picture_file(folder, key) for variant, key in first.items()}
        prompts = plan.shown(table)
        columns = {v: np.split(np.array(Image.open(f)), len(prompts)) for v, f in files.items() if f.is_file()}
        if prompts and len(columns) > 1:
            made.append(folder / f"{table}-pictures.png")
            picture_grid(made[-1], prompts, columns)
    return made
