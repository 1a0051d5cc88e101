"""What all sections of the settings share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Step = Annotated[int, Field(ge=0, le=1000)]
"""A schedule index, or a number of steps."""


class Section(BaseModel):
    """What all sections share: nothing changes after loading, nothing unknown gets in, no number is NaN or infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
