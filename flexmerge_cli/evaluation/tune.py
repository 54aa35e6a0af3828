"""Checks that the data to choose on are not the data to report on, by comparing two specs. Reads no weights."""

from pathlib import Path
from typing import Any

from flexmerge_cli.evaluation.readers import file_digest
from flexmerge_cli.evaluation.spec import EvalSpec


def require_other_data(tuning: EvalSpec, reported: EvalSpec) -> None:
    """Raise UsageError with file and line if both read the same split of a task, or do not have the same tasks."""
    for task in reported.tasks:
        if task not in tuning.tasks:
            raise tuning.document.error(
                ("tasks",),
                f"no task `{task}`, which {reported.document.path} reports",
                hint="both specs need the same tasks",
            )
        if _data(tuning, task) == _data(reported, task):
            raise tuning.document.error(
                ("tasks", task, "data"),
                f"{reported.document.path} reports the same data, so a choice on them says nothing about others",
                hint="give --tune-spec another split, e.g. the validation data",
            )


def _data(spec: EvalSpec, task: str) -> Any:
    """Identify a task's examples: their place, independent of the spec's folder, and the choice among them."""
    data = spec.tasks[task].data_spec
    if data is None:
        return spec.tasks[task].model_dump(mode="json")
    found = {key: value for key, value in data.model_dump(mode="json").items() if value is not None}
    for key, value in found.items():
        if isinstance(value, str) and (spec.folder / value).exists():
            place = (spec.folder / value).resolve()
            found[key] = _content(place)
    return found


def _content(place: Path) -> object:
    """Identify the content of a file, since a copy under another name is the same data."""
    return file_digest(place) if place.is_file() else str(place)
