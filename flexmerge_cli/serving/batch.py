"""Splits one batch of examples of several tasks by task, runs it, and joins the outputs. Knows no bundle."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from flexmerge_cli.errors import UsageError

Run = Callable[[dict[str, dict[str, Any]]], list[Any]]
"""Task -> inputs of its examples; gives the outputs of the tasks' models, in this order."""


def run_batch(run: Run, inputs: Mapping[str, Any], tasks: Sequence[str]) -> list[Any]:
    """Return the output of every example, in order, without the axis of examples. tasks: one name per example.

    Raises UsageError if a tensor has another number of examples.
    """
    for name, value in inputs.items():
        if isinstance(value, Tensor) and (value.dim() == 0 or len(value) != len(tasks)):
            shape = list(value.shape)
            raise UsageError(f"`{name}` is {shape}, and there are {len(tasks)} tasks", hint="give one task per example")
    rows: dict[int, Any] = {}
    places = {task: [place for place, name in enumerate(tasks) if name == task] for task in tasks}
    outputs = run({task: {name: _rows(value, own) for name, value in inputs.items()} for task, own in places.items()})
    for output, own in zip(outputs, places.values()):
        rows |= {place: _row(output, number, len(own)) for number, place in enumerate(own)}
    return [rows[place] for place in range(len(tasks))]


def _rows(value: Any, places: list[int]) -> Any:
    return value[places] if isinstance(value, Tensor) and len(places) < len(value) else value


def _row(value: Any, number: int, count: int) -> Any:
    """Return example `number` of `count`, without what has no axis of examples, such as a mean loss or a cache."""
    if isinstance(value, Tensor):
        return value[number] if value.dim() and len(value) == count else None
    if isinstance(value, Mapping):
        rows = {key: row for key, part in value.items() if (row := _row(part, number, count)) is not None}
        return type(value)(**rows)
    if isinstance(value, (tuple, list)):
        return tuple(_row(part, number, count) for part in value)
    return None
