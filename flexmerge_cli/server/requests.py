"""The bodies of requests. Unknown keys, wrong types and numbers that are not finite are refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexmerge_cli.record import first_error as first_error


class Body(BaseModel):
    """The keys of a request. A key that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: own for key, own in value.items() if own is not None} if isinstance(value, dict) else value


class Predict(Body):
    """`/v1/tasks/NAME/predict`."""

    inputs: Annotated[list[Any], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
