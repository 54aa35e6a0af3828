"""Reads a task's examples as a table: the columns that its kind needs, for the examples that the spec selects.

readers.py reads the formats; the kinds of tasks interpret the columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.evaluation.kinds.kind import Place
from flexmerge_cli.evaluation.readers import Source, guess_format, open_hub, open_source
from flexmerge_cli.evaluation.task_spec import TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column that a kind needs."""

    name: str | None
    """The name in the spec. None: the first of `usual` that exists."""
    usual: tuple[str, ...] = ()
    optional: bool = False
    """Whether the column is omitted if the spec does not name it and none of `usual` exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The examples: n of them, at least 1."""

    columns: Mapping[str, Sequence[Any]]
    """Columns by role: `text`, `label`, …; all of the same length."""
    names: Mapping[str, str]
    """Maps each role to the name in the data."""
    source: str
    """The path as written in the spec, for messages."""
    folder: Path
    """The folder that paths in the data are relative to."""
    digest: str
    """The digest of the bytes read and of the choice of examples."""
    split: str | None
    rows: np.ndarray | None
    """The indices of these examples in the source, from 0. None means all, in order."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def row(self, index: int) -> str:
        """Describe the place of an example, `row 3 of test.jsonl`; counted from 1, without headers."""
        return f"row {int(index if self.rows is None else self.rows[index]) + 1} of {self.source}"

    def texts(self, role: str, place: Place) -> list[str]:
        """Return a column of texts. Raises UsageError."""
        column = list(self.columns[role])
        strange = next((index for index, value in enumerate(column) if not isinstance(value, str)), None)
        if strange is not None:
            found = type(column[strange]).__name__
            raise place.error(
                f"columns.{role}",
                f"`{self.names[role]}` in {self.row(strange)} is not a text: {found}",
                hint="check the value",
            )
        return [str(value) for value in column]

    def numbers(self, role: str, place: Place) -> np.ndarray:
        """Return a column of finite numbers, float64 [n]; texts are parsed. Raises UsageError."""
        found = np.full(len(self), np.nan)
        for index, value in enumerate(self.columns[role]):
            try:
                found[index] = float(value)
            except (TypeError, ValueError):
                pass
        strange = np.flatnonzero(~np.isfinite(found))
        if len(strange):
            value = str(self.columns[role][strange[0]])[:60]
            raise place.error(
                f"columns.{role}",
                f"`{self.names[role]}` in {self.row(strange[0])} is not a number: {value!r}",
                hint="check the value",
            )
        return found


def read_table(task: TaskSpec, place: Place, columns: Mapping[str, Column]) -> Table:
    """Read the columns that a task needs, for the examples that it selects.

    Raises UsageError with file, line and key for a missing column and for no examples, SourceError for missing data,
    DataError for malformed data.
    """
    data = task.data_spec
    if data is None:
        raise place.error("", "no `data` given", hint="data: test.jsonl")
    source = _open(place, data.path, data.format, data.split)
    of_split = f", split `{data.split}`," if data.split else ""
    nothing = place.error("data", f"{data.path}{of_split} has no examples", hint="check the data")
    if not source.names:
        raise nothing
    names = {role: name for role, column in columns.items() if (name := _found(role, column, source, place, data.path))}
    kept: dict[str, Any] = {role: source.get(name) for role, name in names.items()}
    sizes = {name: len(kept[role]) for role, name in names.items()}
    if len(set(sizes.values())) > 1:
        sizes_text = ", ".join(f"`{name}` {size}" for name, size in sizes.items())
        raise place.error("data", f"the columns of {data.path} differ in length: {sizes_text}", hint="check the data")
    count = next(iter(sizes.values()), 0)
    if count == 0:
        raise nothing
    digest, rows = source.digest, _chosen(count, task.limit, task.seed)
    if rows is not None:
        kept = {role: _taken(column, rows) for role, column in kept.items()}
        digest = xxhash.xxh3_128_hexdigest(f"{digest} {task.limit} {task.seed}".encode())
    folder = (place.folder / data.path).parent
    return Table(columns=kept, names=names, source=data.path, folder=folder, digest=digest, split=data.split, rows=rows)


def _open(place: Place, written: str, kind: str | None, split: str | None) -> Source:
    try:
        if is_remote(written):
            return open_hub(written, split)
        path = place.folder / written
        if not path.exists():
            raise SourceError(f"no data at {path}", hint="check the path")
        kind = kind or guess_format(path)
        if kind is None:
            raise UsageError(
                f"the format of {path.name} is unclear from its name", hint="data: {path: …, format: jsonl}"
            )
        return open_source(path, kind, split)
    except (UsageError, SourceError) as error:
        at_place = place.error("data", error.message, hint=error.hint or "check `data`")
        raise type(error)(at_place.message, hint=at_place.hint) from None


def _found(role: str, column: Column, source: Source, place: Place, path: str) -> str | None:
    name = column.name or next((usual for usual in column.usual if usual in source.names), None)
    if name is None and column.optional:
        return None
    if name is None or name not in source.names:
        wanted = f"`{name}`" if name else f"for {role}"
        known = ", ".join(source.names) or "none"
        raise place.error(f"columns.{role}", f"{path} has no column {wanted}", hint=f"its columns: {known}")
    return name


def _chosen(count: int, limit: int | None, seed: int | None) -> np.ndarray | None:
    """Choose the first `limit` examples or, with a seed, as many drawn without repetition; indices in data order."""
    if limit is None or limit >= count:
        return None
    return np.arange(limit) if seed is None else np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _taken(column: Sequence[Any], rows: np.ndarray) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else [column[int(row)] for row in rows]
