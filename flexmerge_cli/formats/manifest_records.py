"""The records of a manifest's parts: tasks, files, groups, units, tensors, and what was added. manifest.py says what
their fields mean; each record answers what can be known from it alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from flexmerge_cli.checkpoint.digest import FileDigests
from flexmerge_cli.checkpoint.libraries import STEMS
from flexmerge_cli.checkpoint.peft import CONFIG_NAME, AdapterKind
from flexmerge_cli.checkpoint.rows import num_rows
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.adapter_changes import ChangeRecord
from flexmerge_cli.formats.plan_records import Parts
from flexmerge_cli.record import Arguments, Count, Digest, Items, Named, Record, Runs, Shape
from flexmerge_cli.residuals.coding_error import RESIDUAL_BITS
from flexmerge_cli.residuals.sign_runs import RUNS
from flexmerge_cli.stored.decoding import Described
from flexmerge_cli.stored.forms import known_form


def packed_errors(values: Sequence[float]) -> str:
    """Write the errors of a group's tasks as the text of `errors`."""
    return np.array(values, ">f8").tobytes().hex()


def unpacked_errors(text: str) -> list[float]:
    """Return the errors from that text, bit by bit as they were."""
    return [float(value) for value in np.frombuffer(bytes.fromhex(text), ">f8")]


def _known_stem(value: str) -> str:
    if value not in STEMS:
        raise ValueError("a stem of weight files that no library uses")
    return value


Stem = Annotated[str, AfterValidator(_known_stem)]


def _known_bits(value: int | float) -> int | float:
    if value not in (0, *RUNS, *RESIDUAL_BITS):
        raise ValueError("a number of bits that no code uses")
    return value


TaskBits = Annotated[int | float, AfterValidator(_known_bits)]


class FileEntry(Record):
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    xxh3: Digest | None = None
    """The digest of the whole file in the manner of tensors; None in bundles from before it was recorded."""
    tasks: Items[str]
    """The tasks that read it; none for the router, which belongs to no task."""

    @property
    def digests(self) -> FileDigests | None:
        """Both digests of the file; None if the bundle has one alone."""
        return None if self.xxh3 is None else FileDigests(self.sha256, self.xxh3)


class AdapterEntry(Record):
    kind: AdapterKind
    weights: str
    """The file's name in tasks/NAME."""
    changes: Named[ChangeRecord]

    def described(self, tensor: Described, weights: Callable[[], Path]) -> Described:
        """Describe a tensor of its model, given what holds for any task. weights: gives the adapter's file."""
        change = self.changes.get(tensor.tensor)
        if change is None:
            return replace(tensor, form="adapted")
        make = partial(change.tensor, weights=weights())
        return replace(tensor, form="adapted", change=make, needs_base=change.value is None)

    def check(self, name: str, file: FileEntry | None, has: Mapping[str, tuple[str, Shape]]) -> None:
        """Raise ValueError unless it is sound. file: its weights. has: name -> dtype and shape of its model's
        tensors."""
        if file is None:
            raise ValueError(f"adapter `{name}` has no weights")
        for key, change in self.changes.items():
            if key not in has:
                raise ValueError(f"adapter `{name}` changes an unknown tensor")
            change.check(*has[key], file.bytes)


class TaskEntry(Record):
    source: str
    fingerprint: Digest
    exact: bool
    distance: float | None
    names: Named[str]
    files: Items[str]
    parts: Parts = Field(default_factory=dict)
    """For each subfolder with weights of its own, the stem of their file names."""
    adapter: AdapterEntry | None = None
    pooled: AdapterKind | None = None
    """The kind of an adapter whose tensors were merged with those of others; it is exported as an adapter."""
    stem: Stem | None = None
    """Present if its folder holds links to the weight files of its route, in the order of their paths: a single one is
    called `<stem>.safetensors`, several are numbered as shards."""

    @property
    def why_no_model(self) -> str | None:
        """Why no model has its tensors, in words that follow its name; None if one has."""
        return None if self.pooled is None else "is an adapter of a pool, and no model"

    @property
    def why_no_lora(self) -> str | None:
        """Why one of its tensors is in no LoRA, in words that follow its name; None if it is, or if it is a model's."""
        return None if self.pooled in (None, AdapterKind.LORA) else "is a factor of (IA)³"

    @property
    def is_kept(self) -> bool:
        """Whether its folder is stored as it was given, over the base: it is in no group."""
        return self.adapter is not None

    @property
    def kept_as(self) -> str | None:
        """What it is kept as; None if it is not kept."""
        return None if self.adapter is None else self.adapter.kind

    @property
    def own_weights(self) -> str | None:
        """The name of the weight file in its folder that holds nothing of other tasks; None if there is none."""
        return None if self.adapter is None else self.adapter.weights

    @property
    def not_in_model(self) -> tuple[str, ...]:
        """The names of the files in its folder that the model it makes of the base lacks."""
        return () if self.adapter is None else (self.adapter.weights, CONFIG_NAME, "README.md")

    def described(self, tensor: Described, weights: Callable[[], Path]) -> Described:
        """Add to what holds for a tensor of any task. weights: gives the file of its own weights."""
        return tensor if self.adapter is None else self.adapter.described(tensor, weights)

    def check(self, name: str, file: FileEntry | None, has: Mapping[str, tuple[str, Shape]]) -> None:
        """Raise ValueError unless it is sound. file: its own weights. has: name -> dtype and shape of its tensors."""
        if self.adapter is not None:
            self.adapter.check(name, file, has)


class MethodEntry(Record):
    name: str
    args: Arguments
    steps: Items[str]
    calibrate: str | None
    origin: tuple[str, str] | None = None
    """For a method that is not part of flexmerge: its file or package, and the sha256 or version of that."""


class GroupEntry(Record):
    tasks: Items[str]
    kind: Annotated[str, AfterValidator(known_form)]
    method: int | None
    distance: Named[float | None]
    bits: Named[TaskBits] | None = None
    errors: str | None = Field(default=None, pattern=r"^([0-9a-f]{16})+$")
    """Float64 of each task, big-endian, in hexadecimal digits."""


class UnitEntry(Record):
    name: str
    tensors: Items[str]
    groups: Items[GroupEntry]


class TensorEntry(Record):
    name: str
    class_: TensorClass = Field(alias="class")
    dtype: str
    shape: Shape
    dtypes: Named[str] | None = None
    shapes: Named[Shape] | None = None
    of: str | None = None
    digests: Named[Digest] = Field(min_length=1)

    def dtype_of(self, task: str) -> str:
        return (self.dtypes or {}).get(task, self.dtype)

    def shape_of(self, task: str) -> Shape:
        return (self.shapes or {}).get(task, self.shape)


class RowsEntry(Record):
    rows: Count
    common: Runs

    @property
    def has_own(self) -> bool:
        """Whether the task has rows of its own."""
        return num_rows(self.common) < self.rows


class VocabularyEntry(Record):
    tensors: Items[str] = Field(min_length=1)
    base: RowsEntry
    """Where the base has the common rows; it is not in the bundle."""
    tasks: Named[RowsEntry]


class AllocationEntry(Record):
    merges: Count
    undone: Count
    fit: str
    dtype: str | None


class GateEntry(Record):
    max_drop: str | None = None
    max_mean_drop: str | None = None
    spec: str = Field(pattern=r"^[0-9a-f]{64}$")
    data: Named[Digest | None]
    not_scored: Items[str]
    versions: Named[str]


class RouterEntry(Record):
    kind: Literal["linear", "centroid", "mlp"]
    features: str
    tasks: Items[str] = Field(min_length=2)
    temperature: float = Field(gt=0)
    accuracy: float = Field(ge=0, le=1)
    examples: Named[Count]
    data: Named[Digest]


class SurgeryEntry(Record):
    rank: Count = Field(ge=1)
    layers: Named[str] = Field(min_length=1)
    examples: Named[Count]
    data: Named[Digest]


class WemoeEntry(Record):
    layers: Count = Field(ge=1, le=2)
    first: Named[str] = Field(min_length=1)
    examples: Named[Count]
    data: Named[Digest]
