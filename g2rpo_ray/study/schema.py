"""The file of a study: variants of a configuration, seeds, the budget of a run, and the comparisons."""

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
"""Name of the model without adapter, a row of every table."""
Name = Annotated[str, Field(pattern=r"^[^|\n]{1,100}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Settings = dict[str, Any]


class Tuning(Section):
    """The grid of learning rates for variants without one."""

    seed: Seed
    """Seed of these runs; it must be in no table."""
    share: float = Field(0.3, gt=0, le=1)
    """Share of the budget for each of these runs."""
    lr: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=2, max_length=64)
    """The grid. The best rate has the highest trained rewards at the end, on held-out prompts."""


class Table(Section):
    """Variants that are compared with each other, on the same seeds."""

    title: str
    seeds: tuple[Seed, ...] = Field(min_length=2, max_length=1000)
    set: Settings = {}
    """Settings of all variants of the table."""
    variants: dict[Name, Settings] = Field(min_length=1, max_length=1000)
    """Settings of each variant, by name. Variants of different tables with equal settings share their runs."""
    against: tuple[Name, ...] = (BASE,)
    """Rows that all others are compared with, paired by prompt and seed."""
    tuned_as: Name | None = None
    """The variant, of any table, whose learning rate all variants use. Unset: each is tuned."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Table":
        if BASE in self.variants:
            raise ValueError(f"variants: {BASE} is a row of every table; give the variant another name")
        for name in self.against:
            if name not in (BASE, *self.variants):
                raise ValueError(f"against: {name} given; allowed are {BASE}, {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} given; a seed is given twice")
        return self


class Study(Section):
    """Tables of variants at equal cost."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Folder of the results."""
    config: PathName
    """The base configuration: as `--config` of a run, or a file in the folder of the study's file."""
    set: Settings = {}
    """Settings of all runs."""
    runner: Literal["process", "ray"] = "process"
    """`process`: each run in one process of this machine. `ray`: on the cluster. Results have the same bits."""
    budget: int = Field(gt=0, le=10**15)
    """Maximum cost of a run in velocity evaluations: of rollouts, and of the learner's states."""
    looks: int = Field(8, ge=1, le=1000)
    """Held-out evaluations of a run after the base's, evenly over its cost. A run of the grid has only the last."""
    reach: tuple[Annotated[float, Field(allow_inf_nan=False)] | Name, ...] = ()
    """Report the cost to these scores of the first trained reward. The name of a variant is its mean at the end."""
    early: float | None = Field(None, gt=0, lt=1)
    """Share of the budget at which each variant's scores are compared with `against` at the end."""
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
                raise ValueError(f"tuning.seed: {self.tuning.seed} is in tables.{key}.seeds; give another")
            tuned = table.tuned_as and variants.get(table.tuned_as)
            if table.tuned_as and (not tuned or tuned.tuned_as):
                raise ValueError(
                    f"tables.{key}.tuned_as: {table.tuned_as} given; must be a variant that is tuned itself"
                )
        return self


def read_study(path: str) -> tuple[Study, Path]:
    """The study of a file, or the packaged one of that name, and its file.

    Raises:
        ValueError: one line with the key or file, the given value and the allowed ones.
    """
    packaged, named = PACKAGED / "studies" / f"{path}.yaml", local_path(path)
    file = packaged if not named.exists() and packaged.is_file() else named
    try:
        with file.open() as stream:
            tree = read_yaml(stream.read(MAX_BYTES + 1))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a study's file") from None
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} must hold a mapping of settings, not {type(tree).__name__}; see configs/studies")
    try:
        return Study.model_validate(tree), file
    except ValidationError as error:
        raise ValueError(f"{path}: {refusal(error, Study)}") from None


def overrides(*given: Mapping[str, Any]) -> list[str]:
    """Settings as `key=value` of `--set`, one for each leaf."""
    return [f"{key}={json.dumps(value)}" for settings in given for key, value in flat(settings)]


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted key."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
