"""Defines what the records of plan.json and manifest.json have in common: they are frozen and refuse unknown keys.

A file may come from a stranger, so the first error ends its reading. Otherwise pydantic would collect an error of some
800 bytes for each item of a list or map, which two bytes of the file can cause.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)

NO_DIGEST = "0" * 32  # where a digest stands that is not known yet
NO_SHA256 = "0" * 64
MAX_FIELDS = 64  # more than any record has
MAX_ARGUMENT_DEPTH = 3
MAX_ARGUMENT_CHARACTERS = 10_000

Item = TypeVar("Item")


class Unsound(Exception):
    """The first error within a map; not a ValueError, so that pydantic stops."""

    def __init__(self, value: Any, place: tuple[object, ...], said: str) -> None:
        """Take what is wrong. value: the item of a map, as pydantic does not say at which key it is."""
        self.value, self.place, self.said = value, place, said

    def __str__(self) -> str:
        place = ".".join(str(step)[:100] for step in self.place[:20])
        return f"{place}: {self.said}" if place else self.said


def _at_once(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        raise _first(error, value) from None
    except Unsound as error:
        error.value = value
        raise


def _with_place(value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
    try:
        return handler(value)
    except Unsound as error:
        key = next((key for key, item in value.items() if item is error.value), "?")
        within = error.place[1:] if error.place[:1] == (info.field_name,) else error.place  # a map within a map
        error.place = (info.field_name, key, *within)
        raise


def _first(error: ValidationError, value: Any = None) -> Unsound:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return Unsound(value, first["loc"], first["msg"][:500])


def first_error(error: ValidationError) -> str:
    """Return where the first error is, and what is wrong there."""
    return str(_first(error))


def require_few(value: Any) -> Any:
    """Return a value; raise ValueError if it is a map with more keys than any record has."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"{len(value):,} keys, more than any record has")
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a method's argument if it is something that a person can write in one line. Raises ValueError for any
    other."""
    match value:
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
        case str() if len(value) <= MAX_ARGUMENT_CHARACTERS:
            return value
        case list() if depth < MAX_ARGUMENT_DEPTH:
            return [_plain(item, depth + 1) for item in value]
        case dict() if depth < MAX_ARGUMENT_DEPTH:
            return {key: _plain(item, depth + 1) for key, item in value.items()}
    raise ValueError("an argument that no method can have")


Items = Annotated[tuple[Item, ...], Field(fail_fast=True)]
Named = Annotated[dict[str, Annotated[Item, WrapValidator(_at_once)]], WrapValidator(_with_place)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Shape = Items[Count]
Runs = Items[tuple[Count, Count]]
Arguments = Named[Annotated[Any, AfterValidator(_plain)]]


class Record(BaseModel):
    """A frozen part of a file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_short(cls, value: Any) -> Any:
        return require_few(value)
