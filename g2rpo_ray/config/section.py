"""Base class and field types of the sections of the settings."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator
from pydantic_core import PydanticCustomError

from g2rpo_ray.imports import FORM, imported
from g2rpo_ray.paths import path_fault, place_fault

Step = Annotated[int, Field(ge=0, le=1000)]
"""A schedule index, or a number of steps."""


def _checked_path(name: str) -> str:
    return _without_fault(name, path_fault(name))


def _checked_place(name: str) -> str:
    if name.startswith("memory://"):
        return _without_fault(name, "memory:// exists in one process only; give a path, or a URI of a storage")
    return _without_fault(name, place_fault(name))


def _without_fault(name: str, fault: str) -> str:
    if fault:
        raise PydanticCustomError("name", "{fault}", {"fault": fault})
    return name


PathName = Annotated[str, AfterValidator(_checked_path)]
"""A local path, a hub id, or `embedded:X`; see `paths.resolve`."""
PlaceName = Annotated[str, AfterValidator(_checked_place)]
"""A path, or the URI of a storage that several processes can read."""


def _importable(path: str) -> str:
    if ":" not in path:
        raise PydanticCustomError("own", "the import path of your own, as {form}", {"form": FORM})
    try:
        imported(path)
    except ValueError as error:
        raise PydanticCustomError("own", "{error}", {"error": str(error)}) from None
    return path


Own = Annotated[str, AfterValidator(_importable)]
"""Import path of the user's own code; imported to check it."""


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no NaN or infinite number."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _no_bool_is_a_number(cls, given: Any, handler: ModelWrapValidatorHandler["Section"]) -> "Section":
        section = handler(given)
        for key, value in given.items() if isinstance(given, Mapping) else ():
            _refuse_bool(key, value, getattr(section, key))
        return section


def _refuse_bool(key: str, given: Any, taken: Any) -> None:
    """Raises ValueError if pydantic converted true to 1 or false to 0."""
    if isinstance(given, bool) and not isinstance(taken, bool):
        raise ValueError(f"{key}: {str(given).lower()} given; must be a number")
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        for name in given.keys() & taken.keys():
            _refuse_bool(f"{key}.{name}", given[name], taken[name])
    elif isinstance(given, list) and isinstance(taken, tuple):
        for number, (one, other) in enumerate(zip(given, taken, strict=False)):
            _refuse_bool(f"{key}.{number}", one, other)
