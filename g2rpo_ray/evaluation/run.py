"""Compares the base model and any number of adapters, by every reward, at several numbers of steps, on the same noise.

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

if TYPE_CHECKING:  # Ray is loaded when there is something to run
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
    """Compare the base model and adapters by every reward, on the same prompts and noise; a row of each comparison.

    What is scored is kept in `output`: an evaluation that is interrupted, or extended, scores the rest.

    Args:
        config: that of the run, or any other of the same model.
        adapters: files or folders by name.
        rewards: in place of `config.rewards`: see `train`.
        prompts: in place of `data.heldout_prompts`: see `train`.
        steps: sampling steps; default: `sampler.steps`.
        seeds: samples of a prompt; default: `evaluation.seeds`.
        hybrid: share of the steps, from the first on, that adapters make; the base makes the rest.
        grid: prompts in the grids of pictures; default: `evaluation.grid_prompts`.
        output: folder for tables, grids and scores; default: `evaluation` in the run directory.
        address: of a Ray cluster: see `train`.

    Raises:
        ValueError: one line; nothing was started.
        RunFailed: one line; error.log in the folder has the trace.
        RunInterrupted: a signal ended it; what was scored is kept.
    """
    given = {"rewards": rewards, "data.heldout_prompts": prompts}
    asked: dict[str, Any] = {"steps": steps, "seeds": seeds, "hybrid": hybrid, "grid": grid, "output": output}
    plan = make_plan(with_settings(config, given), adapters, **asked)
    book = score(plan, address)
    write_results(plan, book)
    return make_rows(plan, book)


def score(plan: EvaluationPlan, address: str | None = None) -> ScoreBook:
    """Sample and score what was not before; all scores. Raises as `evaluate`."""
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
    """Sample and score what the book lacks, block by block.

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
            bar.write(f"{left} of {total} units to sample, each one policy on one prompt at one number of steps")
            going = await interrupt.unless(evaluator.start_evaluation(plan.prompts, states, bar.write))
            for block in missing:
                going = going and await interrupt.unless(evaluator.score(block, keep))
    if going:
        return
    done = total - sum(not book.has(cell) for block in missing for cell in block)
    print(f"stopped; {done} of {total} units are scored and saved. Run the same command to resume")
    raise RunInterrupted
