"""The results of a study as rows: one number and its interval each, for all tables and figures."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.analysis.statistics import Interval
from g2rpo_ray.study.plan import Plan, best_rate
from g2rpo_ray.study.record import Line
from g2rpo_ray.study.schema import BASE
from g2rpo_ray.study.statistics import crossed, crossing, over_seeds


@dataclass(frozen=True, slots=True)
class VariantRow:
    """A number of one variant."""

    table: str
    variant: str
    measure: str  # score, difference, early, cost_to, seconds_to, seconds
    of: str  # the reward; for cost_to and seconds_to, the score to reach
    against: str  # for difference and early, the other variant
    mean: float
    low: float
    high: float
    seeds: int  # number of seeds in the mean
    of_seeds: int  # number of finished seeds


class Results:
    """The results of a plan's runs, from the lines of the record."""

    def __init__(self, plan: Plan, lines: Mapping[str, Line]):
        self.plan, self.lines = plan, lines
        self._runs: dict[tuple[str, str], list[Line]] = {}

    def rate(self, table: str, variant: str) -> tuple[float | None, bool] | None:
        """The tuned learning rate, and True if it is at an end of the grid; None if the grid is not finished."""
        source = self.plan.tuned_as(table, variant)
        if source is None:
            return self.plan.config(table, variant).learner.lr, False
        cases, base = self.plan.tuning(*source), self.lines.get(self.plan.base(source[0]).key)
        if base is None or any(case.key not in self.lines for case in cases):
            return None
        lr = best_rate(cases, self.lines, base).config.learner.lr
        return lr, lr in (min(self.plan.study.tuning.lr), max(self.plan.study.tuning.lr))  # type: ignore[union-attr]

    def runs(self, table: str, variant: str) -> list[Line]:
        """The lines of the finished runs, in the order of seeds; of the base, its evaluation."""
        if (table, variant) not in self._runs:
            self._runs[table, variant] = self._find(table, variant)
        return self._runs[table, variant]

    def _find(self, table: str, variant: str) -> list[Line]:
        if variant == BASE:
            found = self.lines.get(self.plan.base(table).key)
            return [found] if found else []
        rate = self.rate(table, variant)
        cases = self.plan.runs(table, variant, rate[0]) if rate else []
        done = [self.lines[case.key] for case in cases if case.key in self.lines]
        return [line for line in done if "failed" not in line]

    def variants(self, table: str) -> list[str]:
        """The variants with finished runs, the base first."""
        return [variant for variant in (BASE, *self.plan.study.tables[table].variants) if self.runs(table, variant)]

    def curve(self, table: str, variant: str, line: Line, axis: str, reward: str) -> tuple[list[float], list[float]]:
        """`axis` (cost or seconds) and held-out means at each look, the base first."""
        base = self.lines[self.plan.base(table).key]["curve"]
        points = [point for point in (*base, *line["curve"]) if point["means"].get(reward) is not None]
        return [point[axis] for point in points], [point["means"][reward] for point in points]

    def rows(self) -> Iterator[VariantRow]:
        for table in self.plan.study.tables:
            for variant in self.variants(table):
                yield from self._scores(table, variant)
                if variant != BASE:
                    yield from self._early(table, variant)
                    yield from self._costs(table, variant)

    def _scores(self, table: str, variant: str) -> Iterator[VariantRow]:
        runs = self.runs(table, variant)
        for reward in self.plan.rewards(table):
            found = crossed(_scores(runs, reward), variant == BASE)
            yield _row(table, variant, "score", reward, "", found, len(runs), len(runs))
        for other in self.plan.study.tables[table].against:
            by_seed = {line["seed"]: line for line in self.runs(table, other)}
            pairs = [(line, by_seed.get(line["seed"])) for line in runs]
            if other == BASE:
                pairs = [(line, found) for line in runs for found in by_seed.values()]
            both = [(line, found) for line, found in pairs if found]
            if variant in (other, BASE) or not both:
                continue
            for reward in self.plan.rewards(table):
                of, than = (_scores([pair[side] for pair in both], reward) for side in (0, 1))
                found = crossed(of - than)
                yield _row(table, variant, "difference", reward, other, found, len(both), len(runs))

    def _early(self, table: str, variant: str) -> Iterator[VariantRow]:
        """Scores at a share of the budget (interpolated between looks) minus the other variant's end, by seed."""
        study, runs = self.plan.study, self.runs(table, variant)
        if study.early is None:
            return
        for other in study.tables[table].against:
            ends = {line["seed"]: line["curve"][-1]["means"] for line in self.runs(table, other)}
            both = [line for line in runs if line["seed"] in ends and other != BASE]
            for reward in self.plan.rewards(table) if both else ():
                values = []
                for line in both:
                    then = np.interp(study.early * study.budget, *self.curve(table, variant, line, "cost", reward))
                    end = ends[line["seed"]].get(reward)
                    values.append(math.nan if end is None else float(then) - end)
                yield _row(table, variant, "early", reward, other, over_seeds(values), len(both), len(runs))

    def _costs(self, table: str, variant: str) -> Iterator[VariantRow]:
        runs, first = self.runs(table, variant), self.plan.trained(table)[0]
        for label, score in self._reached(table, first):
            for axis in ("cost", "seconds"):
                found = [crossing(*self.curve(table, variant, line, axis, first), score) for line in runs]
                reached = [value for value in found if math.isfinite(value)]
                interval = over_seeds(reached or [math.nan])
                yield _row(table, variant, f"{axis}_to", label, "", interval, len(reached), len(runs))
        seconds = over_seeds([line["curve"][-1]["seconds"] for line in runs])
        yield _row(table, variant, "seconds", "", "", seconds, len(runs), len(runs))

    def _reached(self, table: str, reward: str) -> Iterator[tuple[str, float]]:
        """Labels and scores of `reach`; variants that are not in the table, or have no finished run, are omitted."""
        for given in self.plan.study.reach:
            if not isinstance(given, str):
                yield f"{given:g}", given
            elif given in self.plan.study.tables[table].variants and (runs := self.runs(table, given)):
                score = float(np.nanmean(_scores(runs, reward)))
                yield f"{given}: {score:.4f}", score


def _scores(runs: list[Line], reward: str) -> NDArray[np.float64]:
    """Scores [seeds, prompts] at the end."""
    return np.array([line["scores"][reward] for line in runs], float)


def _row(table: str, variant: str, measure: str, of: str, against: str, found: Interval, *seeds: int) -> VariantRow:
    return VariantRow(table, variant, measure, of, against, found.mean, found.low, found.high, *seeds)


def about(results: Results) -> dict[str, Any]:
    """Learning rate, iterations and counts of each variant, by table."""
    found: dict[str, Any] = {}
    for table in results.plan.study.tables:
        for variant in results.variants(table):
            runs = results.runs(table, variant)
            if variant != BASE:
                rate = results.rate(table, variant)
                found.setdefault(table, {})[variant] = {
                    "lr": rate and rate[0], "at_end_of_grid": bool(rate and rate[1]),
                    "iterations": runs[0]["curve"][-1]["iteration"],
                    "evaluations": runs[0]["evaluations"], "states": runs[0]["states"],
                    "cost": runs[0]["curve"][-1]["cost"], "seeds": [line["seed"] for line in runs],
                }  # fmt: skip
    return found
