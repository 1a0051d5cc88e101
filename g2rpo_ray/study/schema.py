"""A study's file: variants of a configuration, seeds, the budget of a run, and what is compared with what."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from g2rpo_ray.config.loading import PACKAGED, refusal
from g2rpo_ray.config.section import PathName, Section
from g2rpo_ray.config.text import MAX_BYTES, read_yaml
from g2rpo_ray.messages import one_line
from g2rpo_ray.paths import local_path

BASE = "base"
"""The model without adapter: a row of every table."""
Name = Annotated[str, Field(pattern=r"^[^|\n]{1,100}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Settings = dict[str, Any]


class Tuning(Section):
    """Learning rates that every variant tries, if it has none of its own."""

    seed: Seed
    """Of these runs; in no table."""
    share: float = Field(0.3, gt=0, le=1)
    """Of the budget that such a run may spend."""
    lr: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=2, max_length=64)
    """The grid. The best one is that whose trained rewards are highest at the end, on held-out prompts."""


class Table(Section):
    """Variants that are compared with each other, all on the same seeds."""

    title: str
    seeds: tuple[Seed, ...] = Field(min_length=2, max_length=1000)
    set: Settings = {}
    """Settings of all variants here."""
    variants: dict[Name, Settings] = Field(min_length=1, max_length=1000)
    """By name, the settings that differ; a variant with the settings of another table's shares its runs."""
    against: tuple[Name, ...] = (BASE,)
    """Rows that all others are compared with, prompt by prompt and seed by seed."""
    tuned_as: Name | None = None
    """The variant, of any table, whose learning rate all of them have; unset: each has its own tuned."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Table":
        if BASE in self.variants:
            raise ValueError(f"variants: {BASE} is there in every table; give the variant another name")
        for name in self.against:
            if name not in (BASE, *self.variants):
                raise ValueError(f"against: {name} given; allowed are {BASE}, {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        return self


class Study(Section):
    """Tables of variants at equal cost."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Folder of the results."""
    config: PathName
    """The configuration that all settings are over: as `--config` of a run, or a file beside this one."""
    set: Settings = {}
    """Settings of all runs."""
    runner: Literal["process", "ray"] = "process"
    """Each run in one process of this machine, or on the cluster. The bits are the same."""
    budget: int = Field(gt=0, le=10**15)
    """Most that a run may cost: velocity evaluations of rollouts, and what its learner's states count in these."""
    looks: int = Field(8, ge=1, le=1000)
    """Held-out evaluations of a run after the one of the base, evenly over its cost; a run of the grid has its last."""
    reach: tuple[Annotated[float, Field(allow_inf_nan=False)] | Name, ...] = ()
    """Scores of the first trained reward whose cost is told; the name of a variant is its mean at the end."""
    early: float | None = Field(None, gt=0, lt=1)
    """A share of the budget: what each variant has reached by then is compared with `against` at the end."""
    tuning: Tuning | None = None
    tables: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")], Table] = Field(min_length=1, max_length=100)

    @field_validator("reach", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return given if isinstance(given, list | tuple) else [given]

    @model_validator(mode="after")
    def _tables_agree(self) -> "Study":
        variants = {name: table for table in self.tables.values() for name in table.variants}
        for key, table in self.tables.items():
            if self.tuning and self.tuning.seed in table.seeds:
                raise ValueError(f"tuning.seed: {self.tuning.seed} is among tables.{key}.seeds; give another")
            tuned = table.tuned_as and variants.get(table.tuned_as)
            if table.tuned_as and (not tuned or tuned.tuned_as):
                raise ValueError(f"tables.{key}.tuned_as: {table.tuned_as} is no variant that is tuned itself")
        return self


def read_study(path: str) -> tuple[Study, Path]:
    """The study in a file, or the packaged one of that name, and the file.

    Raises:
        ValueError: one line that names the key or file, what was given and what is allowed.
    """
    packaged, named = PACKAGED / "studies" / f"{path}.yaml", local_path(path)
    file = packaged if not named.exists() and packaged.is_file() else named
    try:
        with file.open() as stream:
            tree = read_yaml(stream.read(MAX_BYTES + 1))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name a study's file") from None
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} must hold a mapping of settings, not {type(tree).__name__}; see configs/studies")
    try:
        return Study.model_validate(tree), file
    except ValidationError as error:
        raise ValueError(f"{path}: {refusal(error, Study)}") from None


def overrides(*given: Mapping[str, Any]) -> list[str]:
    """Settings as `--set` takes them, leaf by leaf."""
    return [f"{key}={json.dumps(value)}" for settings in given for key, value in flat(settings)]


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their dotted keys."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
