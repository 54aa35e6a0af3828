"""Writes the bytes of manifest.json from an allocation and what a run measured; without a run they are as long. Pure.

formats/manifest.py says what the keys mean, and what readers check.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexmerge_cli.allocation.allocation import Allocation, Group, Tasks, Unit
from flexmerge_cli.allocation.files import WeightFile
from flexmerge_cli.allocation.storage import Storage, effective_dtype, reads_base
from flexmerge_cli.checkpoint.digest import FileDigests
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.manifest import FORMAT
from flexmerge_cli.formats.manifest_records import packed_errors
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.recorded import Request
from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.record import NO_DIGEST, NO_SHA256
from flexmerge_cli.stored.dense import COPY
from flexmerge_cli.version import GENERATOR


@dataclass(slots=True, kw_only=True)
class Measured:
    """What only the run knows. What is not known yet is written as zeros of the same width."""

    task_distance: dict[int, float | None] = field(default_factory=dict)
    group_distance: dict[tuple[str, Tasks], dict[int, float | None]] = field(default_factory=dict)
    """The distance of each task of a group: (unit, tasks of the group) -> task -> distance."""
    errors: dict[tuple[str, Tasks], dict[int, float]] = field(default_factory=dict)
    """The lost squares Σ (θ̂ - θ)² of each task of a group over its unit, by the same keys."""
    build: str = NO_DIGEST
    """The digest of the versions and the machine on which the stored values depend."""
    digests: dict[str, dict[int, str]] = field(default_factory=dict)
    """The digest of each decoded tensor: aligned name -> task -> digest."""
    files: dict[str, FileDigests] = field(default_factory=dict)
    """The digests of each file, by its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFile:
    """A file of one task, or of the base for all kept adapters: config, tokenizer, index, an adapter's weights."""

    path: str
    readers: Tasks
    num_bytes: int
    origin: tuple[str, str] | None = None
    """The task, or "" for the base, and the name of the side file that this is a copy of."""
    content: bytes = b""
    """The content of a file that is not a copy."""


class _Number:
    """A number that is written as exactly these characters."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def fixed(value: float | None) -> _Number:
    """Write a number as `1.234567e-01`, or null, in 12 characters."""
    if value is None or not math.isfinite(value):
        return _Number("null        ")
    return _Number(f"{value if value == 0 or 1e-99 <= value < 1e100 else 0:.6e}")


def canonical(value: Any) -> bytes:
    """Encode as JSON with sorted keys and no spaces, and `_Number`s as they are."""
    text = json.dumps(value, default=_encodable, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return re.sub(r'"\\u0000([^"]*)"', r"\1", text).encode()


def _encodable(value: Any) -> Any:
    """Put a NUL, which no path or name can hold, before a number, so that it can be distinguished from text."""
    if isinstance(value, _Number):
        return "\0" + value.text
    return dict(value)


def manifest_frame(
    plan: Plan,
    allocation: Allocation,
    storages: Mapping[str, Storage],
    files: Sequence[WeightFile],
    small: Sequence[SmallFile],
    stems: Mapping[int, str],
    measured: Measured,
    gate: Mapping[str, Any] | None = None,
    request: Request | None = None,
) -> dict[str, Any]:
    """Return the whole manifest except its units and tensors, without its id. stems: those of the links, by task."""
    names = plan.reader_names
    inexact = inexact_tasks(plan, storages, allocation.dtype)
    tasks = {
        member.name: {
            "source": member.source,
            "fingerprint": member.fingerprint,
            "exact": index not in inexact,
            "distance": fixed(measured.task_distance.get(index, 0.0)),
            "names": member.names,
            "files": _files_of(index, files, small),
        }
        | ({"parts": member.parts} if member.parts else {})
        | member.entry(plan.settings.adapters)
        | ({"stem": stems[index]} if index in stems else {})
        for index, member in enumerate(plan.readers)
    }
    entries = {
        file.path: {"bytes": file.num_bytes, "tasks": [names[task] for task in file.readers]} for file in files
    } | {file.path: {"bytes": file.num_bytes, "tasks": [names[task] for task in file.readers]} for file in small}
    for path, entry in entries.items():
        entry |= measured.files.get(path, FileDigests(NO_SHA256, NO_DIGEST))._asdict()
    rows = [tensor_entry(plan, tensor.name, allocation.dtype, measured) for tensor in plan.rows]
    optional = plan.division | ({"rows": rows} if rows else {}) | ({"gate": gate} if gate else {})
    optional |= {"request": request.padded()} if request is not None else {}
    return optional | {
        "format": FORMAT,
        "id": NO_SHA256,
        "generator": GENERATOR,
        "build": measured.build,
        "plan": plan.sha256,
        "base": plan.base.fingerprint,
        "allocation": {
            "merges": allocation.merges,
            "undone": allocation.undone,
            "fit": allocation.fit,
            "dtype": allocation.dtype,
        },
        "one_model_bytes": plan.one_model_bytes,
        "stored_bytes": sum(part.num_bytes for file in files for part in file.parts) + plan.own_bytes,
        "methods": [method_entry(use) for use in allocation.methods],
        "tasks": tasks,
        "files": entries,
        "units": [],
        "tensors": [],
    }


def method_entry(use: MethodUse) -> dict[str, Any]:
    origin = use.call.method.origin
    return {
        "name": use.call.method.name,
        "args": dict(use.call.args),
        "steps": [step.text for step in use.steps],
        "calibrate": use.calibrate and use.calibrate.text,
        "origin": origin and [origin.source, origin.version],
    }


def _files_of(reader: int, files: Sequence[WeightFile], small: Sequence[SmallFile]) -> list[str]:
    found: list[WeightFile | SmallFile] = [*files, *small]
    return sorted(file.path for file in found if reader in file.readers)


def manifest_bytes(value: dict[str, Any]) -> bytes:
    """Return the bytes of the file, with its id filled in."""
    data = canonical(value)
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(f'"id":"{NO_SHA256}"'.encode(), f'"id":"{digest}"'.encode(), 1)


def amended(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return the bytes of a manifest after a change of its fields, with a new id. Its numbers stay as they are written.

    data: the bytes of a sound manifest.
    """
    value = json.loads(data, parse_float=_Number)
    change(value)
    return manifest_bytes(value | {"id": NO_SHA256})


def inexact_tasks(plan: Plan, storages: Mapping[str, Storage], cast: str | None) -> set[int]:
    """Return the tasks that do not come back bit by bit: some tensor of them is not a copy, or is cast to another
    dtype."""
    found: set[int] = set()
    for storage in storages.values():
        for group in storage.groups:
            found.update(task for task in group.coded_tasks if not reads_base(storage.tensor, group, task))
        if cast is not None:
            dtypes = {task: storage.tensor.dtype_of(task) for task in storage.tensor.present}
            found.update(task for task, dtype in dtypes.items() if effective_dtype(dtype, cast) != dtype)
    return found


def unit_kind(unit: Unit, storages: Mapping[str, Storage], tasks: Tasks) -> str:
    """Return the kind of a group of a unit: a copy only if all of its tensors are copies."""
    forms = {group.form.word for name in unit.tensors for group in storages[name].groups if group.tasks == tasks}
    return next(iter(forms - {COPY.word}), COPY.word)


def unit_entry(
    plan: Plan, unit: Unit, storages: Mapping[str, Storage], cast: str | None, measured: Measured
) -> dict[str, Any]:
    groups = [group_entry(plan, unit, group, storages, cast, measured) for group in unit.groups]
    return {"name": unit.name, "tensors": list(unit.tensors), "groups": groups}


def group_entry(
    plan: Plan, unit: Unit, group: Group, storages: Mapping[str, Storage], cast: str | None, measured: Measured
) -> dict[str, Any]:
    kind = unit_kind(unit, storages, group.tasks)
    distances = measured.group_distance.get((unit.name, group.tasks), {})
    names = [plan.tasks[task].name for task in group.tasks]
    entry: dict[str, Any] = {
        "tasks": names,
        "kind": kind,
        "method": None if kind == COPY.word else group.method,
        "distance": {plan.tasks[task].name: fixed(distances.get(task, 0.0)) for task in group.tasks},
    }
    if kind != COPY.word or cast is not None:
        errors = measured.errors.get((unit.name, group.tasks), {})
        entry["errors"] = packed_errors([errors.get(task, 0.0) for task in group.tasks])
    if group.bits and kind != COPY.word:
        entry["bits"] = {name: bits for name, bits in zip(names, group.bits) if bits != "exact"}
    return entry


def entry_names(plan: Plan) -> list[str]:
    """Return the names of the tensors that some member has, in the order of their entries."""
    found = [tensor.name for tensor in plan.tensors if tensor.class_ is not TensorClass.BASE_ONLY or plan.kept]
    return found + plan.own_names


def tensor_entry(plan: Plan, name: str, cast: str | None, measured: Measured) -> dict[str, Any]:
    tensor, run = plan.find(name), measured.digests.get(name, {})
    dtypes, shapes, digests = {}, {}, {}
    for place, member in enumerate(plan.readers):
        given = member.given(name, tensor, place)
        if given is not None:
            dtypes[member.name] = given.dtype if given.digest else effective_dtype(given.dtype, cast)
            shapes[member.name], digests[member.name] = list(given.shape), given.digest or run.get(place, NO_DIGEST)
    first = next(iter(dtypes))
    entry: dict[str, Any] = {
        "name": name,
        "class": tensor.class_.value if tensor is not None else TensorClass.PRIVATE.value,
        "dtype": dtypes[first],
        "shape": shapes[first],
        "digests": digests,
    }
    if len(set(dtypes.values())) > 1:
        entry["dtypes"] = dtypes
    if any(shape != shapes[first] for shape in shapes.values()):
        entry["shapes"] = shapes
    if tensor is not None and tensor.class_ is TensorClass.TIED:
        entry["of"] = tensor.reason
    return entry
