"""Compares the base model and adapters by every reward, at several numbers of steps, on the same noise.

adapters × steps × prompts ─► cells ─► rollout actors ─► images ─► reward servers ─► scores.jsonl ─► tables and grids
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from g2rpo_ray.analysis.statistics import AdapterRow
from g2rpo_ray.config import Config, with_settings
from g2rpo_ray.evaluation.plan import EvaluationPlan, make_plan
from g2rpo_ray.evaluation.results import make_rows, write_results
from g2rpo_ray.evaluation.scores import ScoreBook
from g2rpo_ray.exits import RunInterrupted
from g2rpo_ray.rollout.cost import object_store_bytes
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.runs.trace import traced
from g2rpo_ray.types import Cell, FloatArray, Images

if TYPE_CHECKING:  # imports Ray
    from g2rpo_ray.actors.interrupt import Interrupt


def evaluate(
    config: Config,
    adapters: Mapping[str, str | os.PathLike[str]] | Sequence[str] = (),
    *,
    rewards: Mapping[str, Any] | None = None,
    prompts: Any = None,
    steps: Sequence[int] | None = None,
    seeds: int | None = None,
    hybrid: float = 1.0,
    grid: int | None = None,
    output: str | os.PathLike[str] | None = None,
    address: str | None = None,
) -> list[AdapterRow]:
    """Compares the base model and adapters by every reward, on the same prompts and noise. Returns a row each.

    Scores are saved in `output`, so an interrupted or extended evaluation computes only missing ones.

    Args:
        config: that of the run, or any other of the same model.
        adapters: files or folders by name.
        rewards: instead of `config.rewards`: see `train`.
        prompts: instead of `data.heldout_prompts`: see `train`.
        steps: sampling steps. Default: `sampler.steps`.
        seeds: samples of a prompt. Default: `evaluation.seeds`.
        hybrid: share of the steps, from the first, that adapters make; the base makes the rest.
        grid: prompts in the grids of images. Default: `evaluation.grid_prompts`.
        output: folder for tables, grids and scores. Default: `evaluation` in the run directory.
        address: of a Ray cluster: see `train`.

    Raises:
        ValueError: one line; nothing was started.
        RunFailed: one line; error.log in the folder has the trace.
        RunInterrupted: a signal ended it; scores are saved.
    """
    given = {"rewards": rewards, "data.heldout_prompts": prompts}
    asked: dict[str, Any] = {"steps": steps, "seeds": seeds, "hybrid": hybrid, "grid": grid, "output": output}
    plan = make_plan(with_settings(config, given), adapters, **asked)
    book = score(plan, address)
    write_results(plan, book)
    return make_rows(plan, book)


def score(plan: EvaluationPlan, address: str | None = None) -> ScoreBook:
    """Samples and scores the missing cells; returns all scores. Raises as `evaluate`."""
    book = ScoreBook(plan.folder)
    missing = [[cell for cell in block if not book.has(cell)] for block in plan.blocks()]
    missing = [block for block in missing if block]
    if not missing:
        return book
    from g2rpo_ray.actors.cluster import check_resources, cluster

    with ExitStack() as stack:
        stack.enter_context(cluster(address, object_store_bytes(plan.config)))
        check_resources(plan.config)
        from g2rpo_ray.actors.interrupt import run_interruptible

        plan.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(traced(Folder(plan.folder)))
        run_interruptible(lambda interrupt: _sample(plan, book, missing, interrupt))
    return book


async def _sample(
    plan: EvaluationPlan, book: ScoreBook, missing: Sequence[Sequence[Cell]], interrupt: "Interrupt"
) -> None:
    """Samples and scores the missing cells, block by block.

    Raises:
        RunInterrupted: a signal ended it.
    """
    from g2rpo_ray.actors.evaluation import Evaluator
    from g2rpo_ray.actors.system import open_system

    total, left = len(plan.prompts) * len(plan.places()), sum(map(len, missing))
    states = {column.version: column.adapter.state for column in plan.columns}
    with tqdm(total=total, initial=total - left, unit="unit", desc="evaluate", dynamic_ncols=True, disable=None) as bar:

        def keep(cell: Cell, scores: dict[str, FloatArray], picture: Images | None) -> None:
            book.add(cell, scores, picture)
            bar.update()

        async with open_system(Evaluator, plan.config, plan.metadata, Folder(plan.folder)) as evaluator:
            bar.write(f"{left} of {total} units to sample (a unit is one policy, prompt and number of steps)")
            running = await interrupt.unless(evaluator.start_evaluation(plan.prompts, states, bar.write))
            for block in missing:
                running = running and await interrupt.unless(evaluator.score(block, keep))
    if running:
        return
    done = total - sum(not book.has(cell) for block in missing for cell in block)
    print(f"stopped; {done} of {total} units are scored and saved. Run the same command to resume")
    raise RunInterrupted
