"""What the records of plan.json and manifest.json have in common: they are frozen, and refuse what they do not know."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Shape = tuple[Count, ...]
Runs = tuple[tuple[Count, Count], ...]


class Record(BaseModel):
    """A frozen part of a file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)
