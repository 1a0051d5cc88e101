"""What all sections of the settings share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """What all sections share: nothing changes after loading, nothing unknown gets in."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
