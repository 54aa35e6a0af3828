"""Parses results of external code: a number, or predictions and labels. JSON-like values in, `Scored` out.

value             the score; n: examples; interval: [low, high]
metric            its name; by default that of the spec, or `score`
higher_is_better  by default true
predictions, labels   instead of value: one per example, for a metric of flexmerge, with an interval and a paired
                  bound like those of other kinds
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.metrics import METRICS, Takes
from flexmerge_cli.evaluation.scored import Given, Scored
from flexmerge_cli.record import Record

KINDS = {
    Takes.CLASSES: "iub",
    Takes.NUMBERS: "iuf",
    Takes.SCORES: "iuf",
    Takes.LIKELIHOODS: "iuf",
    Takes.TEXTS: "U",
    Takes.GENERATED: "U",
}


class Answer(Record):
    value: float | None = None
    n: int | None = Field(default=None, ge=1)
    interval: tuple[float, float] | None = None
    metric: str | None = None
    higher_is_better: bool = True
    predictions: list[Any] | None = None
    labels: list[Any] | None = None
    notes: tuple[str, ...] = ()


def scored_of(answer: Any, who: str, metric: str | None) -> Scored:
    """Parse a result. who: names the code in messages. metric: the spec's. Raises DataError."""
    if isinstance(answer, int | float | np.number) and not isinstance(answer, bool):
        answer = {"value": float(answer)}
    hint = '{"value": 0.9, "n": 100, "metric": "accuracy"}, or "predictions" and "labels" instead of "value"'
    if not isinstance(answer, Mapping):
        raise DataError(f"{who} gave {type(answer).__name__}, which is not a score", hint=hint)
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in answer.items()}
    try:
        found = Answer.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{who} gave a malformed score: {where}: {first['msg']}", hint=hint) from None
    name = found.metric or metric or "score"
    if found.value is not None:
        given = Given(value=found.value, n=found.n, interval=found.interval, higher_is_better=found.higher_is_better)
        return Scored(metric=name, given=given, notes=found.notes)
    return _compared(name, found, who, hint)


def _compared(name: str, found: Answer, who: str, hint: str) -> Scored:
    try:
        takes = METRICS[name].takes
        KINDS[takes]
    except KeyError:
        raise DataError(f"{who} gave predictions of `{name}`, which is not a metric of flexmerge", hint=hint) from None
    try:
        arrays = [np.asarray(values if values is not None else []) for values in (found.predictions, found.labels)]
    except ValueError:  # from rows that differ in length
        arrays = []
    if len(arrays) != 2 or not len(arrays[0]) or len(arrays[0]) != len(arrays[1]):
        raise DataError(f"{who} must give predictions and labels of the same length, at least 1", hint=hint)
    axes = 2 if takes is Takes.SCORES else 1
    if arrays[0].ndim != axes or arrays[0].dtype.kind not in KINDS[takes] or arrays[1].dtype.kind not in KINDS[takes]:
        said = f"{arrays[0].dtype} {list(arrays[0].shape)} and {arrays[1].dtype} {list(arrays[1].shape)}"
        raise DataError(f"{who} gave {said}, and `{name}` takes {takes}", hint=hint)
    return Scored(metric=name, predictions=arrays[0], labels=arrays[1], notes=found.notes)
