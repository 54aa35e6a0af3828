"""A task's examples as a table: columns of equal length, and a digest of what was read. Knows nothing of kinds.

npz, safetensors  arrays of one first axis, by name
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.errors import DataError, SourceError
from flexmerge_cli.evaluation.kinds.kind import Place
from flexmerge_cli.evaluation.task_spec import TaskSpec

SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".npz": "npz",
    ".safetensors": "safetensors",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """n examples."""

    columns: Mapping[str, Sequence[Any]]
    source: str
    """For messages."""
    digest: str
    """Of the bytes as read, and of the choice of examples."""
    split: str | None = None
    rows: np.ndarray | None = None
    """Which of the source's examples these are, from 0; None: all, in order."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def row(self, index: int) -> int:
        """Of the source, from 1, as editors count."""
        return int(index if self.rows is None else self.rows[index]) + 1


def read_table(task: TaskSpec, place: Place, columns: Mapping[str, str | None]) -> Table:
    """The columns that a task needs, of the examples that it asks for.

    columns: key of the spec below `columns` -> name in the data; None: not needed. Raises UsageError with file, line
    and key for a missing column and for no examples, SourceError for missing data, DataError for malformed data.
    """
    data = task.data_spec
    if data is None:
        raise place.error("data", "no data", hint="data: test.jsonl")
    path = place.folder / data.path
    found, digest = _read(path, data.format or SUFFIXES.get(path.suffix.lower(), ""), place)
    wanted = {key: name for key, name in columns.items() if name is not None}
    for key, name in wanted.items():
        if name not in found:
            known = ", ".join(map(str, found)) or "none"
            raise place.error(f"columns.{key}", f"{data.path} has no column `{name}`", hint=f"its columns: {known}")
    kept: dict[str, Any] = {name: found[name] for name in wanted.values()}
    count = min((len(column) for column in kept.values()), default=0)
    if any(len(column) != count for column in kept.values()):
        sizes = ", ".join(f"`{name}` {len(column)}" for name, column in kept.items())
        raise place.error("data", f"the columns of {data.path} differ in length: {sizes}", hint="check the data")
    if count == 0:
        raise place.error("data", f"{data.path} has no examples", hint="check the data")
    rows = _chosen(count, task.limit, task.seed)
    if rows is not None:
        kept = {name: _taken(column, rows) for name, column in kept.items()}
        digest = xxhash.xxh3_128_hexdigest(f"{digest} {task.limit} {task.seed}".encode())
    return Table(columns=kept, source=data.path, digest=digest, split=data.split, rows=rows)


def _chosen(count: int, limit: int | None, seed: int | None) -> np.ndarray | None:
    """The first `limit`, or with a seed as many drawn without repetition, in the order of the data."""
    if limit is None or limit >= count:
        return None
    return np.arange(limit) if seed is None else np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _taken(column: Sequence[Any], rows: np.ndarray) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]


def _read(path: Path, kind: str, place: Place) -> tuple[Mapping[str, Any], str]:
    if not path.exists():
        raise SourceError(
            f"{place.document.path}, line {place.document.line(('tasks', place.task, 'data'))}: "
            f"tasks.{place.task}.data: no data at {path}",
            hint="check `data`",
        )
    if kind != "npz":
        raise place.error("data", f"{path.name} is of no known format", hint="npz")
    return _read_npz(path), digest_bytes(path.read_bytes())


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is no sound .npz: {error}", hint="write it with numpy.savez") from None
