"""What is unsound in a record of a file is said with its place, within maps, too."""

from typing import Any

import pytest
from pydantic import Field, ValidationError

from flexmerge_cli.formats.plan_part import PartCoding, PartRequest, PlanPart
from flexmerge_cli.formats.recorded import Request
from flexmerge_cli.record import Count, Named, Record, Unsound, first_error
from flexmerge_cli.request.choices import MergeWords


class Task(Record):
    digests: Named[Count]


class File(Record):
    tasks: Named[Task]
    weights: Named[float | Named[float]] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tasks": {"a": {"digests": {"x": 1, "y": "?"}}}}, "tasks.a.digests.y: "),
        ({"tasks": {"a": {"digests": {}}, "b": {"digest": {}}}}, "tasks.b.digests: "),
        ({"tasks": {"a": {"digests": 7}}}, "tasks.a.digests: "),
        ({"tasks": {}, "weights": {"a": 1, "b": "?"}}, "weights.b.float: "),
        ({"tasks": {}, "weights": {"a": {"x": 1, "y": []}}}, "weights.a.y: "),
        ({"tasks": 5}, "tasks: "),
        ({"more": 1}, "tasks: "),
    ],
)
def test_an_error_says_where_it_is(fields: dict[str, Any], place: str) -> None:
    """Within a map, the names of the map and of the item were left out."""
    with pytest.raises((ValidationError, Unsound)) as raised:
        File.model_validate(fields)
    error = raised.value
    said = first_error(error) if isinstance(error, ValidationError) else str(error)
    assert said.startswith(place)


MANY: dict[str, Any] = {str(number): [] for number in range(1000)}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (MergeWords, {"steps": list(MANY.values())}),
        (Request, {"method_for": list(MANY.values())}),
        (PartRequest, {"tasks": MANY}),
        (PartCoding, {"base": MANY, "average": {"x": 1, **MANY}, "ratio": {}}),
        (PlanPart, {"headers": MANY}),
    ],
)
def test_errors_are_no_more_than_the_fields_of_a_record(kind: type[Record], fields: dict[str, Any]) -> None:
    """There was one for every item of some lists and maps, of a hundred times its bytes."""
    with pytest.raises((ValidationError, Unsound)) as raised:
        kind.model_validate(fields)
    assert isinstance(raised.value, Unsound) or raised.value.error_count() < 20
