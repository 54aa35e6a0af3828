"""manifest.json, `flexmerge.bundle/1`: canonical JSON, sorted keys, UTF-8. Its bytes, from an allocation; its schema.

id        sha256 of these bytes with its own 64 digits set to 0
files     {path: {bytes, sha256, tasks}} of every file but this one; a path MUST stay inside the bundle
tasks     {name: {…, names, files}}: `names` maps aligned to own names where they differ; `files` is the route and the
          files under tasks/NAME
units     which tasks share what, how (kind), and each task's distance there
tensors   every tensor of every task: class, dtype, shape (`dtypes`, `shapes` per task where they differ), and per
          task that has it the digest of what a reader gets; `of` is the target of a tied one
A part's name is the tensor's plain name (in the first reader's own words) if it is dense, else
`<tensor>@<role>[.<task>]`. A tensor whose plain name is on a task's route is dense; otherwise its unit's group says
how to decode: masked is base + gamma·mask·unified, gamma being `<unit>@gamma.<task>`, or 1 where there is none.
Measured numbers have 12 characters, so that the size is known before the run.
Written last, so it is the commit point: a folder without it is no bundle. Readers MUST refuse unknown keys.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from flexmerge_cli.allocation.allocation import Allocation, Tasks, Unit
from flexmerge_cli.allocation.files import WeightFile
from flexmerge_cli.allocation.plan_file import Digest, Plan, Record, Shape
from flexmerge_cli.allocation.storage import Storage, effective_dtype
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.methods.method import Call
from flexmerge_cli.version import GENERATOR

FORMAT = "flexmerge.bundle/1"
NO_SHA256 = "0" * 64
NO_DIGEST = "0" * 32


@dataclass(slots=True, kw_only=True)
class Measured:
    """What only the run knows; as it stands, placeholders of the same width."""

    task_distance: dict[int, float | None] = field(default_factory=dict)
    group_distance: dict[tuple[str, Tasks], dict[int, float | None]] = field(default_factory=dict)
    """(unit, tasks of the group) -> task -> distance."""
    digests: dict[str, dict[int, str]] = field(default_factory=dict)
    """Aligned name -> task -> digest of the decoded tensor."""
    sha256: dict[str, str] = field(default_factory=dict)
    """By path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFile:
    """A file of one task: config, tokenizer, index."""

    path: str
    task: int
    num_bytes: int


class FileEntry(Record):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tasks: tuple[str, ...] = Field(min_length=1)


class TaskEntry(Record):
    source: str
    fingerprint: Digest
    exact: bool
    distance: float | None
    names: dict[str, str]
    files: tuple[str, ...]


class MethodEntry(Record):
    name: str
    args: dict[str, Any]
    steps: tuple[str, ...]
    calibrate: str | None


class GroupEntry(Record):
    tasks: tuple[str, ...]
    kind: Literal["copy", "merged", "masked", "residual"]
    method: int | None
    distance: dict[str, float | None]


class UnitEntry(Record):
    name: str
    tensors: tuple[str, ...]
    groups: tuple[GroupEntry, ...]


class TensorEntry(Record):
    name: str
    class_: TensorClass = Field(alias="class")
    dtype: str
    shape: Shape
    dtypes: dict[str, str] | None = None
    shapes: dict[str, Shape] | None = None
    of: str | None = None
    digests: dict[str, Digest]


class AllocationEntry(Record):
    merges: int
    undone: int
    fit: str
    dtype: str | None


class Manifest(Record):
    format: Literal["flexmerge.bundle/1"]
    id: str = Field(pattern=r"^[0-9a-f]{64}$")
    generator: str
    plan: str
    allocation: AllocationEntry
    one_model_bytes: int
    stored_bytes: int
    methods: tuple[MethodEntry, ...]
    tasks: dict[str, TaskEntry]
    files: dict[str, FileEntry]
    units: tuple[UnitEntry, ...]
    tensors: tuple[TensorEntry, ...]


class _Number(str):
    """A number that is written as these 12 characters."""


def fixed(value: float | None) -> _Number:
    """`1.234567e-01`, or null, in 12 characters."""
    if value is None or not math.isfinite(value):
        return _Number("null        ")
    return _Number(f"{value if value == 0 or 1e-99 <= value < 1e100 else 0:.6e}")


def canonical(value: Any) -> bytes:
    """JSON, sorted keys, no spaces, `_Number`s as they are."""
    text = json.dumps(_marked(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return re.sub(r'"\\u0000([^"]{12})"', r"\1", text).encode()


def _marked(value: Any) -> Any:
    """Numbers behind a NUL, which no path or name can hold, so that they can be told from text."""
    if isinstance(value, _Number):
        return "\0" + value
    if isinstance(value, Mapping):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item) for item in value]
    return value


def manifest_bytes(
    plan: Plan,
    allocation: Allocation,
    calls: Sequence[Call],
    storages: Mapping[str, Storage],
    files: Sequence[WeightFile],
    small: Sequence[SmallFile],
    measured: Measured,
) -> bytes:
    """The whole file, its id filled in."""
    names = plan.task_names
    tasks = {
        task.name: {
            "source": task.source,
            "fingerprint": task.fingerprint,
            "exact": is_exact(plan, storages, index, allocation.dtype),
            "distance": fixed(measured.task_distance.get(index, 0.0)),
            "names": task.names,
            "files": sorted(
                [file.path for file in files if index in file.readers]
                + [file.path for file in small if file.task == index]
            ),
        }
        for index, task in enumerate(plan.tasks)
    }
    entries = {
        file.path: {"bytes": file.num_bytes, "tasks": [names[task] for task in file.readers]} for file in files
    } | {file.path: {"bytes": file.num_bytes, "tasks": [names[file.task]]} for file in small}
    for path, entry in entries.items():
        entry["sha256"] = measured.sha256.get(path, NO_SHA256)
    value = {
        "format": FORMAT,
        "id": NO_SHA256,
        "generator": GENERATOR,
        "plan": plan.sha256,
        "allocation": {
            "merges": allocation.merges,
            "undone": allocation.undone,
            "fit": allocation.fit,
            "dtype": allocation.dtype,
        },
        "one_model_bytes": plan.one_model_bytes,
        "stored_bytes": sum(part.num_bytes for file in files for part in file.parts),
        "methods": [
            {"name": call.method.name, "args": dict(call.args), "steps": [], "calibrate": None} for call in calls
        ],
        "tasks": tasks,
        "files": entries,
        "units": [_unit(plan, unit, storages, measured) for unit in allocation.units],
        "tensors": [
            _tensor(plan, storage, allocation.dtype, measured)
            for storage in storages.values()
            if storage.tensor.class_ is not TensorClass.BASE_ONLY
        ],
    }
    data = canonical(value)
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(f'"id":"{NO_SHA256}"'.encode(), f'"id":"{digest}"'.encode(), 1)


def is_exact(plan: Plan, storages: Mapping[str, Storage], task: int, cast: str | None) -> bool:
    """Whether a task comes back bit by bit: all of it copies, and no cast that changes a dtype."""
    return all(
        effective_dtype(storage.tensor.dtype_of(task), cast) == storage.tensor.dtype_of(task)
        and all(group.kind == "copy" for group in storage.groups if task in group.tasks)
        for storage in storages.values()
        if task in storage.tensor.present
    )


def unit_kind(unit: Unit, storages: Mapping[str, Storage], tasks: Tasks) -> str:
    """Of a group of a unit: copy only if all its tensors are."""
    kinds = {group.kind for name in unit.tensors for group in storages[name].groups if group.tasks == tasks}
    return next(iter(kinds - {"copy"}), "copy")


def _unit(plan: Plan, unit: Unit, storages: Mapping[str, Storage], measured: Measured) -> dict[str, Any]:
    groups = []
    for group in unit.groups:
        kind = unit_kind(unit, storages, group.tasks)
        distances = measured.group_distance.get((unit.name, group.tasks), {})
        groups.append(
            {
                "tasks": [plan.tasks[task].name for task in group.tasks],
                "kind": kind,
                "method": None if kind == "copy" else group.method,
                "distance": {plan.tasks[task].name: fixed(distances.get(task, 0.0)) for task in group.tasks},
            }
        )
    return {"name": unit.name, "tensors": list(unit.tensors), "groups": groups}


def _tensor(plan: Plan, storage: Storage, cast: str | None, measured: Measured) -> dict[str, Any]:
    tensor = storage.tensor
    digests = measured.digests.get(tensor.name, {})
    dtypes = {plan.tasks[task].name: effective_dtype(tensor.dtype_of(task), cast) for task in tensor.present}
    shapes = {plan.tasks[task].name: list(tensor.shape_of(task)) for task in tensor.present}
    first = plan.tasks[tensor.present[0]].name
    entry: dict[str, Any] = {
        "name": tensor.name,
        "class": tensor.class_.value,
        "dtype": dtypes[first],
        "shape": shapes[first],
        "digests": {plan.tasks[task].name: digests.get(task, NO_DIGEST) for task in tensor.present},
    }
    if len(set(dtypes.values())) > 1:
        entry["dtypes"] = dtypes
    if any(shape != shapes[first] for shape in shapes.values()):
        entry["shapes"] = shapes
    if tensor.class_ is TensorClass.TIED:
        entry["of"] = tensor.reason
    return entry
