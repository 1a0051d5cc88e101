"""What a study costs, before anything runs."""

from collections.abc import Mapping
from pathlib import Path

from g2rpo_ray.config import Config
from g2rpo_ray.files import resolve
from g2rpo_ray.study.plan import Case, Plan
from g2rpo_ray.study.record import Line
from g2rpo_ray.study.rows import Results


def describe(plan: Plan, lines: Mapping[str, Line], tflops: float | None) -> str:
    """For each variant: iterations of a run, runs that are planned and done; then the cost of all of them.

    Args:
        tflops: TFLOP/s of a device, to tell the hours of one; None: they are not told.
    """
    said = ["| table | variant | iterations | runs of the grid | runs | done |", "|---" * 6 + "|"]
    planned: dict[str, Case] = {}
    results = Results(plan, lines)
    for name, table in plan.study.tables.items():
        for variant in table.variants:
            grid, runs = plan.tuning(name, variant), plan.runs(name, variant, None)
            planned |= {case.key: case for case in (*grid, *runs)}
            done = len(results.runs(name, variant))
            most = "at most " if runs[0].config.sampler.is_auto else ""
            said.append(
                f"| {name} | {variant} | {most}{runs[0].config.iterations} | {len(grid)} | {len(runs)} | {done} |"
            )
    cost = sum(case.budget for case in planned.values())
    samples = sum(_heldout(plan, case) for case in planned.values())
    said.append(
        f"\n{len(planned)} runs, since what several tables have is run once. In velocity evaluations: {cost:.3g} of "
        f"training, {samples:.3g} of held-out samples"
    )
    if tflops is not None:
        said.append(_hours(plan.base(next(iter(plan.study.tables))).config, plan.study.tflop, cost, samples, tflops))
    return "\n".join(said)


def _heldout(plan: Plan, case: Case) -> int:
    """Evaluations of all looks of a run, the base's left out."""
    config, prompts = case.config, len(plan.prompts(case.table, case.variant).heldout)
    looks = -(-config.iterations // config.evaluation.every)
    return looks * prompts * config.evaluation.seeds * config.sampler.steps * config.sample_cost


def _hours(config: Config, tflop: float | None, cost: float, samples: float, tflops: float) -> str:
    """The device hours of so many evaluations; VAE and rewards are beside them."""
    counted = tflop or _tflop(config)
    if not counted:
        return f"no hours: the files of {config.model.path} are not here; give the study `tflop`, of one evaluation"
    hours = (cost + samples) * counted / tflops / 3600
    return (
        f"An evaluation is {counted:.3g} TFLOP: {hours:,.0f} device hours at {tflops:g} TFLOP/s "
        f"({hours / 16:,.0f} hours of 16 devices); VAE, rewards and waiting are beside that"
    )


def _tflop(config: Config) -> float | None:
    if not Path(resolve(config.model.path)).is_dir():
        return None
    from g2rpo_ray.models.base import FlowModel
    from g2rpo_ray.models.estimate import operations

    return operations(FlowModel.skeleton(config.model), 1) / 1e12
