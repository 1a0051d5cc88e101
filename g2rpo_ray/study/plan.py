"""The runs of a study: configurations, iterations by the budget, keys in the record."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from g2rpo_ray.config import Config, load_config
from g2rpo_ray.config.resume import SAMPLING, TRAINING, affects_result, matches, placement, settings
from g2rpo_ray.data import Prompts
from g2rpo_ray.paths import EMBEDDED, resolve
from g2rpo_ray.preflight import check_lasting, read_run_prompts
from g2rpo_ray.rollout.auto import RULE
from g2rpo_ray.rollout.cost import affordable, iteration_cost
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.study.schema import BASE, Settings, Study, flat, overrides

RATE = "learner.lr"


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a study, done or to do."""

    kind: Literal["base", "tuning", "run"]
    table: str
    variant: str
    config: Config  # with the iterations that the budget allows
    budget: float  # in velocity evaluations
    looks: int  # held-out evaluations, the last one at the end
    key: str
    base: str  # key of the base that it is compared with
    shown: bool = False  # True if images of it are kept

    @property
    def words(self) -> str:
        if self.kind == "base":
            return f"{self.table}: base"
        return f"{self.table}: {self.variant}, seed {self.config.seed}, lr {self.config.learner.lr:g}"

    def of_base(self) -> "Case":
        """The evaluation of the base that this run is compared with."""
        return Case("base", self.table, BASE, self.config, 0, 1, self.base, self.base, shown=True)


class Plan:
    """A study with the configurations of all variants."""

    def __init__(self, study: Study, file: Path, given: Sequence[str] = ()):
        """
        Args:
            study: the content of the study's file.
            file: the study's file; `study.config` may be in its folder.
            given: `section.key=value` for all runs.

        Raises:
            ValueError: one line that names the variant.
        """
        self.study, self._file, self._given = study, file, given
        self._configs = {
            (table, variant): self._load(table, variant) for table, t in study.tables.items() for variant in t.variants
        }
        self._prompts: dict[tuple[str, str], Prompts] = {}
        self._iterations: dict[tuple[str, str, int, float], int] = {}

    def _load(self, table: str, variant: str) -> Config:
        study, in_folder = self.study, self._file.parent / resolve(self.study.config)
        try:
            config = load_config(str(in_folder) if in_folder.is_file() else study.config,
                                 [*overrides(*self._layers(table, variant)), *self._given])  # fmt: skip
        except ValueError as error:
            raise ValueError(f"tables.{table}.variants.{variant}: {error}") from None
        check_lasting(config)
        output = f"{config.output}/{study.name}"
        shared = config.data.embeddings or str(Folder(output) / "embeddings")
        data = config.data.model_copy(update={"embeddings": shared})
        return config.model_copy(update={"output": output, "data": data})

    def _layers(self, table: str, variant: str) -> list[Settings]:
        of_table = self.study.tables[table]
        return [self.study.set, of_table.set, of_table.variants[variant]]

    def config(self, table: str, variant: str) -> Config:
        return self._configs[table, variant]

    def trained(self, table: str) -> list[str]:
        """Names of the rewards that the table's variants train on."""
        return list(self.base(table).config.rewards)

    def rewards(self, table: str) -> list[str]:
        return list(self.base(table).config.all_rewards)

    def base(self, table: str) -> Case:
        """The evaluation of the model without adapter."""
        first = next(iter(self.study.tables[table].variants))
        key = self._key(self.config(table, first), self.prompts(table, first))
        return Case("base", table, BASE, self.config(table, first), 0, 1, key, key, shown=True)

    def tuning(self, table: str, variant: str) -> list[Case]:
        """Runs of the grid; empty if the learning rate is given or is another variant's."""
        tuning = self.study.tuning
        if not tuning or self.study.tables[table].tuned_as or self._has_rate(table, variant):
            return []
        budget = tuning.share * self.study.budget
        return [self._case("tuning", table, variant, tuning.seed, budget, lr) for lr in tuning.lr]

    def runs(self, table: str, variant: str, lr: float | None) -> list[Case]:
        """A run for each seed, with the tuned learning rate `lr`."""
        seeds = self.study.tables[table].seeds
        return [self._case("run", table, variant, seed, self.study.budget, lr) for seed in seeds]

    def tuned_as(self, table: str, variant: str) -> tuple[str, str] | None:
        """The table and variant whose tuning decides the learning rate; None if it is given."""
        name = self.study.tables[table].tuned_as
        if not self.study.tuning or self._has_rate(table, variant):
            return None
        if name is None:
            return table, variant
        return next((key, name) for key, other in self.study.tables.items()
                    if key != table and name in other.variants and not other.tuned_as)  # fmt: skip

    def _has_rate(self, table: str, variant: str) -> bool:
        given = [key for layer in self._layers(table, variant) for key, _ in flat(layer)]
        return RATE in given or any(setting.startswith(f"{RATE}=") for setting in self._given)

    def _case(self, kind: Any, table: str, variant: str, seed: int, budget: float, lr: float | None) -> Case:
        config = self._configs[table, variant]
        learner = config.learner if lr is None else config.learner.model_copy(update={"lr": lr})
        config = config.model_copy(update={"seed": seed, "learner": learner})
        looks = self.study.looks if kind == "run" else 1
        place = (table, variant, seed if config.sampler.is_drawn else 0, budget)
        if place not in self._iterations:
            self._iterations[place] = self._count(config, table, variant, budget)
        iterations = self._iterations[place]
        judged = config.evaluation.model_copy(update={"every": math.ceil(iterations / looks)})
        key = self._key(config, self.prompts(table, variant), budget, looks)
        if learner.lr_schedule != "constant":  # with `auto`, over the maximum of iterations
            learner = learner.model_copy(update={"lr_iterations": learner.lr_iterations or iterations})
        run = {"iterations": iterations, "evaluation": judged, "learner": learner, "name": key}
        config = config.model_copy(update=run)
        shown = kind == "run" and seed == self.study.tables[table].seeds[0]
        base = self._key(config, self.prompts(table, variant))
        if base != self.base(table).key:
            raise ValueError(
                f"tables.{table}.variants.{variant}: scores cannot be compared; rewards, prompts, steps and sampling "
                "must be those of the table's first variant"
            )
        return Case(kind, table, variant, config, budget, looks, key, base, shown)

    def _count(self, config: Config, table: str, variant: str, budget: float) -> int:
        """Number of iterations that the budget allows; with `auto`, the maximum."""
        train, cheapest = self.prompts(table, variant).train, config.sampler.cheapest
        if (cost := iteration_cost(config, train, 0)) > budget:
            raise ValueError(
                f"budget: {budget:g} for a run of {table}, {variant}; an iteration costs {cost:g}, so give more"
            )
        return affordable(config, train, budget, choice=cheapest)

    def shown(self, table: str) -> tuple[str, ...]:
        """The held-out prompts whose images are kept."""
        shown = self.base(table).config.evaluation.grid_prompts
        return self.prompts(table, next(iter(self.study.tables[table].variants))).heldout[:shown]

    def prompts(self, table: str, variant: str) -> Prompts:
        if (table, variant) not in self._prompts:
            self._prompts[table, variant] = read_run_prompts(self._configs[table, variant])
        return self._prompts[table, variant]

    def _key(self, config: Config, prompts: Prompts, budget: float = 0, looks: int = 0) -> str:
        """Digest of everything that affects the result: settings other than the default, prompts, embedded files.

        Budget 0 is an evaluation of the base, which settings of training do not affect.
        """
        given = settings_given(config)
        data = settings(config, prompts.train, prompts.heldout, prompts.metadata)["data"]
        given |= {f"data.{name}": data[name] for name in ("train_prompts", "heldout_prompts")}
        if config.sampler.is_auto and budget:
            given["sampler.auto.rule"] = RULE
        untrained = () if budget else ("seed", *TRAINING)
        values = {
            key: value
            for key, value in given.items()
            if affects_result(key) and (key in SAMPLING or not matches(key, untrained))
        }
        files = [_content(value) for value in values.values() if isinstance(value, str) and value.startswith(EMBEDDED)]
        text = json.dumps([values, files, budget, looks], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings_given(config: Config) -> dict[str, Any]:
    """The settings other than the default by dotted key, with devices and threads."""
    given = dict(flat(config.model_dump(mode="json", exclude_defaults=True)))
    return given | {key: value for key, value in placement(config).items() if value != 1}


def best_rate(cases: Sequence[Case], record: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]) -> Case:
    """The run of a grid with the highest trained rewards at the end.

    They are compared by the weighted sum of their increases, each in standard deviations of the base's scores over
    prompts. A run that failed, or lacks scores of a reward, is the worst.
    """
    import numpy as np

    from g2rpo_ray.analysis.statistics import judges

    start = {name: np.array(scores, float) for name, scores in base["scores"].items()}

    def rise(case: Case) -> float:
        line = record[case.key]
        if "failed" in line:
            return -math.inf
        names = judges(case.config.rewards, case.config.eval_rewards, start)
        rises = {name: np.array(line["scores"][name], float) - start[name] for name in names}
        if not all(np.isfinite(of_prompts).any() for of_prompts in rises.values()):
            return -math.inf
        return sum(case.config.all_rewards[name].weight * float(np.nanmean(of_prompts))
                   / (float(np.nanstd(start[name])) or 1.0) for name, of_prompts in rises.items())  # fmt: skip

    return max(cases, key=rise)


@lru_cache
def _content(name: str) -> str:
    """Digest of an embedded file, or of all files in an embedded folder."""
    path, digest = Path(resolve(name)), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path.parent).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
