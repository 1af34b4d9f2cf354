"""What all sections of a recipe have in common: strict types, no unknown key, no change after loading."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**53)]  # what JSON carries exactly
NonNegative = Annotated[int, Field(ge=0, lt=2**53)]
Rate = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A mapping of a recipe file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)
