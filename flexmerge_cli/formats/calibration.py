"""Defines the format `flexmerge.calibration/1`: what each fine-tuned model of a plan sees and does on its own examples.

calibration.json   canonical JSON. `tasks` has, for each task, the fingerprint of its weights in the plan, the digest of
                   its examples and their number n, its file, and what was measured for each tensor, by the plan's names
<task>.safetensors float32, per tensor:
    <tensor>@inputs   mean of xᵀx over the rows x that went into the layer, [n(n+1)/2]: the lower triangle row by row
                      ((i, j) with j ≤ i is at i(i+1)/2 + j); for an embedding table, the part of the look-ups that
                      each row had, [rows]
    <tensor>@fisher   mean over the examples of (∂ log p(y|x) / ∂θ)², y drawn from the model, in the weight's shape
    <tensor>@outputs  mean of the layer's outputs
`inputs` of the index gives the layout of a weight: linear [out, n], conv1d [n, out], conv2d [out, n as channels ×
height × width of a patch], or embedding; its `of` names the tensor that got the very same inputs and stores them for
both. Settings and versions are for information only, but for `through`: the merge whose models gave the inputs, by its
options and the digest of its groups. A calibration belongs to weights, not to a plan: every plan of the same fine-tuned
models can use it. One that was measured through a merge belongs to merges with these groups.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, FlexmergeError, IntegrityError, SourceError
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.folders import stays_inside
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.methods.method import Scope, Where
from flexmerge_cli.record import NO_SHA256, Count, Digest, Items, Named, Record, Unsound, first_error
from flexmerge_cli.regular_file import read_file

FORMAT: Literal["flexmerge.calibration/1"] = "flexmerge.calibration/1"
INDEX_NAME = "calibration.json"
MAX_INDEX_BYTES = 64 << 20
AGAIN = "flexmerge calibrate plan.json --spec calib.yaml -o calibration/"

Statistic = Literal["inputs", "fisher", "outputs"]
STATISTICS: tuple[Statistic, ...] = ("inputs", "fisher", "outputs")
InputLayout = Literal["linear", "conv1d", "conv2d", "embedding"]


class InputsEntry(Record):
    layout: InputLayout
    rows: Count
    of: str | None = None


class FisherEntry(Record):
    mean: float = Field(ge=0)


class OutputsEntry(Record):
    rows: Count


class CalibratedTask(Record):
    weights: Digest
    data: Digest
    n: Count
    file: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    inputs: Named[InputsEntry]
    fisher: Named[FisherEntry]
    outputs: Named[OutputsEntry]


class ThroughEntry(Record):
    """The merge whose models gave the inputs, instead of the fine-tuned ones."""

    request: str
    """Its options, as one would type them."""
    groups: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The digest of its allocation."""


class CalibrationSettings(Record):
    statistics: Items[Statistic]
    examples: Count
    seed: Count
    device: str
    dtypes: Named[str | None]
    spec: str = Field(pattern=r"^[0-9a-f]{64}$")
    through: ThroughEntry | None = None


class Index(Record):
    format: Literal["flexmerge.calibration/1"] = FORMAT
    generator: str
    settings: CalibrationSettings
    versions: Named[str]
    tasks: Named[CalibratedTask]

    def dump(self) -> bytes:
        fields = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """The inputs of one tensor in each task of a group."""

    layout: InputLayout
    arrays: Sequence[np.ndarray]
    """The stored array of each task: the lower triangle of [n, n], or [rows] of an embedding table."""

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, task: int) -> np.ndarray:
        """Return the symmetric matrix of a task, float32 [n, n]; for an embedding table, [rows]."""
        packed = self.arrays[task]
        return packed if self.layout == "embedding" else unpacked(packed)


def half_size(n: int) -> int:
    """Return how many elements of a symmetric [n, n] are stored."""
    return n * (n + 1) // 2


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Return the symmetric matrix, [n, n], of a stored lower triangle, [n(n+1)/2], in the same dtype."""
    n = int((2 * packed.size) ** 0.5)
    found = np.empty((n, n), packed.dtype)
    for row in range(n):
        start = half_size(row)
        found[row, : row + 1] = found[: row + 1, row] = packed[start : start + row + 1]
    return found


def inputs_of(layout: InputLayout, shape: Sequence[int]) -> int:
    """Return the number of a layer's inputs, or of an embedding table's rows, from the shape of its weight."""
    return int(shape[0] if layout in ("conv1d", "embedding") else np.prod(shape[1:], dtype=np.int64))


@dataclass(kw_only=True)
class Measurements(ABC):
    """What was measured of a plan's tasks, as methods read it."""

    plan: Plan
    digest: str
    """The SHA-256 of the index, which contains those of the files."""

    @abstractmethod
    def entry(self, task: int, statistic: str, tensor: str) -> Any:
        """Return the entry of a whole tensor; None if it was not measured."""

    @abstractmethod
    def array(self, task: int, statistic: str, tensor: str) -> np.ndarray:
        """Return the stored array of a whole tensor that was measured, float32, flat."""

    def scope(self, reads: str, tensor: str) -> Scope:
        """Return how much of a tensor a method that reads a statistic must see: all of a matrix with known inputs."""
        layout = self.layout(tensor) if reads == "inputs" else None
        return "element" if layout in (None, "embedding") else "tensor"

    def layout(self, tensor: str) -> InputLayout | None:
        """Return the layout of a tensor's inputs; None unless they are known for every task of the plan that has it."""
        found = {
            entry.layout if (entry := self._entry(task, "inputs", tensor)) else None for task in self._have(tensor)
        }
        one = found.pop() if len(found) == 1 else None
        part = whole_of(tensor)[1]
        if part is not None and one is not None:  # Parts share their inputs only if the outputs were split.
            split = self.plan.split(tensor)
            outputs = 1 if one == "conv1d" else 0
            return one if split is not None and split.dim == outputs and one != "embedding" else None
        return one

    def measured(self, reads: str, where: Where, count: int) -> Any:
        """Return what a method gets in one call: Moments or, for `fisher`, float32 [k, count] and each task's mean.

        None if it was not measured for every task of the group.
        """
        tasks = [self.plan.task_names.index(name) for name in where.tasks]
        if reads == "inputs":
            layout = self.layout(where.tensor)
            if layout is None:
                return None
            return Moments(layout=layout, arrays=[self._array(task, "inputs", where.tensor) for task in tasks])
        entries = [self._entry(task, "fisher", where.tensor) for task in tasks]
        if whole_of(where.tensor)[1] is not None or None in entries:
            return None
        rows = [self._array(task, "fisher", where.tensor)[where.start : where.start + count] for task in tasks]
        return np.stack(rows), [entry.mean for entry in entries if entry is not None]

    def importance(self, tensor: str) -> np.ndarray | None:
        """Return the mean Fisher information of a tensor, or of the whole that it is a part of, for each task, [M].

        None if it was not measured for every task.
        """
        entries = [self._entry(task, "fisher", tensor) for task in self.plan.all_tasks]
        return None if None in entries else np.array([entry.mean for entry in entries])

    def _have(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.plan.tensor(tensor).present)

    def _entry(self, task: int, statistic: str, tensor: str) -> Any:
        return self.entry(task, statistic, whole_of(tensor)[0])

    def _array(self, task: int, statistic: str, tensor: str) -> np.ndarray:
        of = getattr(self._entry(task, statistic, tensor), "of", None)
        return self.array(task, statistic, of or whole_of(tensor)[0])


@dataclass(kw_only=True)
class Unmeasured(Measurements):
    """A calibration in which nothing is measured yet; bundles that record it have their final size."""

    digest: str = NO_SHA256

    def entry(self, task: int, statistic: str, tensor: str) -> Any:
        return None

    def array(self, task: int, statistic: str, tensor: str) -> np.ndarray:
        raise KeyError(tensor)


@dataclass(kw_only=True)
class CalibrationData(Measurements):
    """An open calibration of a plan's tasks. Its files are mapped, and an array is read when it is used."""

    path: Path
    index: Index
    tensors: Mapping[str, Mapping[str, StoredTensor]]
    _maps: dict[Path, np.ndarray] = field(default_factory=dict)

    def entry(self, task: int, statistic: str, tensor: str) -> Any:
        return getattr(self.index.tasks[self.plan.tasks[task].name], statistic).get(tensor)

    def array(self, task: int, statistic: str, tensor: str) -> np.ndarray:
        stored = self.tensors[self.plan.tasks[task].name][f"{tensor}@{statistic}"]
        if stored.path not in self._maps:
            self._maps[stored.path] = np.memmap(stored.path, np.uint8, mode="r")
        data = self._maps[stored.path][stored.offset : stored.offset + stored.num_bytes]
        return np.asarray(data.view("<f4"))


def is_calibration(folder: Path) -> bool:
    """Return whether a folder holds the index of a calibration."""
    try:
        return f'"format":"{FORMAT}"'.encode() in read_file(folder / INDEX_NAME, MAX_INDEX_BYTES, "a calibration")
    except (FlexmergeError, OSError):
        return False


def read_index(folder: Path) -> tuple[Index, str]:
    """Read the index of a calibration. Returns it and its SHA-256. Raises SourceError, DataError."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise SourceError(f"no calibration at {folder}: it has no {INDEX_NAME}", hint=AGAIN)
    data = read_file(path, MAX_INDEX_BYTES, "a calibration")
    try:
        fields = parse_json(data, is_ours=True)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise DataError(f"{path} is not a calibration ({FORMAT})", hint=AGAIN)
        index = Index.model_validate(fields)
    except (ValidationError, Unsound) as error:
        reason = first_error(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{path} is not sound: {reason}", hint=AGAIN) from None
    except ValueError as error:
        raise DataError(f"{path} is not a calibration: {error}", hint=AGAIN) from None
    if outside := [entry.file for entry in index.tasks.values() if not stays_inside(entry.file)]:
        raise DataError(f"{path}: `{outside[0]}` leads out of the folder", hint="do not use this calibration")
    return index, hashlib.sha256(data).hexdigest()


def read_calibration(folder: Path, plan: Plan) -> CalibrationData:
    """Open a calibration for a plan. Reads every file once to check its digest.

    Raises SourceError if there is none, DataError if it belongs to other weights or is unsound, IntegrityError if a
    file is missing or damaged.
    """
    index, digest = read_index(folder)
    problems = []
    for task in plan.tasks:
        entry = index.tasks.get(task.name)
        if entry is None:
            problems.append(f"task `{task.name}`: not in the calibration")
        elif entry.weights != task.fingerprint:
            problems.append(
                f"task `{task.name}`: calibrated with weights {entry.weights}, the plan has {task.fingerprint}"
            )
    if problems:
        some = "\n  ".join(problems[:20])
        raise DataError(f"{folder} is no calibration of this plan:\n  {some}", hint=AGAIN)
    tensors = {task.name: _opened(folder, index.tasks[task.name]) for task in plan.tasks}
    found = CalibrationData(path=folder, plan=plan, index=index, digest=digest, tensors=tensors)
    for place, task in enumerate(plan.tasks):
        _check(found, place, index.tasks[task.name])
    return found


def _opened(folder: Path, entry: CalibratedTask) -> dict[str, StoredTensor]:
    path = folder / entry.file
    if not path.is_file() or path.stat().st_size != entry.bytes:
        now = f"{path.stat().st_size:,} bytes" if path.is_file() else "missing"
        raise IntegrityError(f"{path} is {now}; the calibration has {entry.bytes:,}", hint=AGAIN)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise IntegrityError(f"{path} was changed: its sha256 is not that of the calibration", hint=AGAIN)
    return read_header(path)[0]


def _check(found: CalibrationData, place: int, entry: CalibratedTask) -> None:
    """Raise DataError for arrays that the file lacks, or that do not have the size of the plan's tensors."""
    task, plan = found.plan.tasks[place].name, found.plan
    shapes = {name: shape for tensor in plan.tensors for name, shape in [(tensor.name, tensor.shape_of(place))]
              if place in tensor.present}  # fmt: skip
    for part in [name for name in shapes if whole_of(name)[1] is not None]:
        split = plan.split(part)
        assert split is not None
        shapes[split.tensor] = split.whole(shapes[part])
    wanted: dict[str, int] = {}
    for name, inputs in entry.inputs.items():
        n = inputs_of(inputs.layout, shapes.get(name, (0, 0)))
        wanted[f"{inputs.of or name}@inputs"] = n if inputs.layout == "embedding" else half_size(n)
    wanted |= {f"{name}@fisher": int(np.prod(shapes.get(name, (0,)), dtype=np.int64)) for name in entry.fisher}
    for name, count in wanted.items():
        stored = found.tensors[task].get(name)
        if stored is None or stored.dtype != "F32" or stored.num_elements != count:
            now = f"{stored.dtype} {list(stored.shape)}" if stored is not None else "missing"
            raise DataError(f"{found.path}: `{name}` of task `{task}` is {now}, not {count:,} F32", hint=AGAIN)
