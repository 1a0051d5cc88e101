"""The cost of a study, before anything runs."""

from collections.abc import Mapping

from g2rpo_ray.analysis.tables import markdown_table
from g2rpo_ray.config import Config
from g2rpo_ray.rehearsal.devices import Fleet
from g2rpo_ray.rehearsal.hours import interval_in_words, seconds
from g2rpo_ray.rehearsal.published import with_shapes
from g2rpo_ray.study.plan import Case, Plan
from g2rpo_ray.study.record import Line
from g2rpo_ray.study.rows import Results


def describe_study(plan: Plan, lines: Mapping[str, Line], fleet: Fleet | None) -> str:
    """Iterations, planned and finished runs of each variant, and the total cost.

    Args:
        fleet: devices to estimate hours for; None: no estimate.
    """
    rows: list[tuple[object, ...]] = []
    planned: dict[str, Case] = {}
    results = Results(plan, lines)
    for name, table in plan.study.tables.items():
        for variant in table.variants:
            grid, runs = plan.tuning(name, variant), plan.runs(name, variant, None)
            planned |= {case.key: case for case in (*grid, *runs)}
            done = len(results.runs(name, variant))
            most = "at most " if runs[0].config.sampler.is_auto else ""
            rows.append((name, variant, f"{most}{runs[0].config.iterations}", len(grid), len(runs), done))
    cost = sum(case.budget for case in planned.values())
    samples = sum(_heldout(plan, case) for case in planned.values())
    parts = [markdown_table(["table", "variant", "iterations", "runs of the grid", "runs", "done"], rows)]
    parts.append(
        f"\n{len(planned)} runs; tables share equal runs. In velocity evaluations: {cost:.3g} of "
        f"training, {samples:.3g} of held-out samples"
    )
    if fleet:
        parts.append(_hours(plan.base(next(iter(plan.study.tables))).config, cost + samples, fleet))
    return "\n".join(parts)


def _heldout(plan: Plan, case: Case) -> int:
    """Velocity evaluations of all looks of a run, without the base's."""
    config, prompts = case.config, len(plan.prompts(case.table, case.variant).heldout)
    looks = -(-config.iterations // config.evaluation.every)
    return looks * prompts * config.evaluation.seeds * config.sampler.steps * config.sample_cost


def _hours(config: Config, evaluations: float, fleet: Fleet) -> str:
    """The device-hours of velocity evaluations, without decoding and rewards."""
    from g2rpo_ray.models.estimate import count_operations

    if (shaped := with_shapes(config)) is None:
        return f"no hours: the shapes of {config.model.path} are unknown; give a folder with the model's files"
    each = count_operations(shaped).evaluation
    found = [one / 3600 for one in seconds(evaluations * each, fleet, 1)]
    money = "" if fleet.price is None else f", money {interval_in_words([fleet.price * one for one in found])}"
    return (
        f"An evaluation is {each:.3g}e12 operations: {interval_in_words(found)} device-hours of a {fleet.kind}{money}; "
        f"{interval_in_words([one / fleet.number for one in found])} hours of {fleet.number} at full utilisation, "
        "without decoding, rewards and waiting"
    )
