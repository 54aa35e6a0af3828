"""Finds the parts that make a tensor of a task. Reads nothing: names and shapes say what can be decoded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexmerge_cli.bundle.manifest_file import file_inside
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.family import ROWS_SUFFIX
from flexmerge_cli.family.split import Split
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.formats.manifest_records import TensorEntry, UnitEntry
from flexmerge_cli.stored.decoding import Described, Packable, RouteParts, Stored
from flexmerge_cli.stored.forms import stored_as


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Answers how each tensor is stored, from a manifest and the parts of the files that are there."""

    path: Path
    """The bundle's, for errors."""
    manifest: Manifest
    parts: Mapping[str, Mapping[str, StoredTensor]]
    """File -> part name -> where it lies."""
    _methods: list[tuple[str, str]] = field(init=False)
    """The name and the arguments, as JSON, of each."""
    _units: dict[str, UnitEntry] = field(init=False)
    _tensors: dict[str, TensorEntry] = field(init=False)
    _entries: dict[str, list[TensorEntry]] = field(init=False)
    """By task: of its tensors and rows, in the manifest's order."""
    _splits: dict[str, Split] = field(init=False)
    """Aligned name of the whole -> how it is split."""
    _dense: dict[str, dict[str, StoredTensor]] = field(init=False)
    """Task -> aligned name -> the dense part."""
    _parts: dict[str, RouteParts] = field(init=False)
    """By task."""

    def __post_init__(self) -> None:
        manifest = self.manifest
        tensors = {tensor.name: tensor for tensor in manifest.stored}
        entries: dict[str, list[TensorEntry]] = {task: [] for task in manifest.tasks}
        for entry in manifest.stored:
            for task in entry.digests:
                entries[task].append(entry)
        dense: dict[str, dict[str, StoredTensor]] = {task: {} for task in manifest.tasks}
        parts = {task: RouteParts(self.path, task) for task in manifest.tasks}
        for name, found in self.parts.items():
            readers = manifest.files[name].tasks
            names = manifest.tasks[readers[0]].names  # dense parts have the names of the first reader
            aligned = {own: name for name, own in names.items()}
            plain = {
                tensor.name: part
                for own, part in found.items()
                if (tensor := tensors.get(aligned.get(own, own))) is not None
                and readers[0] in tensor.digests
                and names.get(tensor.name, tensor.name) == own
            }
            for task in readers:
                dense[task] |= plain
                parts[task] |= found
        methods = [(method.name, json.dumps(method.args)) for method in manifest.methods]
        object.__setattr__(self, "_methods", methods)
        object.__setattr__(self, "_units", {name: unit for unit in manifest.units for name in unit.tensors})
        object.__setattr__(self, "_tensors", tensors)
        object.__setattr__(self, "_entries", entries)
        object.__setattr__(self, "_splits", {split.tensor: split for split in manifest.splits})
        object.__setattr__(self, "_dense", dense)
        object.__setattr__(self, "_parts", parts)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.manifest.tasks)

    def tensor_of(self, task: str, aligned: str) -> tuple[str, tuple[int, ...]]:
        """Return a task's (dtype, shape) of one tensor."""
        if (split := self._splits.get(aligned)) is not None:
            dtype, shape = self.tensor_of(task, split.names[0])
            return dtype, split.whole(shape)
        tensor, rows = self._tensors[aligned], self.manifest.rows_of(aligned, task)
        shape = tensor.shape_of(task)
        return tensor.dtype_of(task), shape if rows is None else (rows.rows, *shape[1:])

    def stored_as(self, task: str, aligned: str) -> Stored:
        """Return how an entry of the manifest is stored: a tensor, or rows of one.

        Raises DataError if the manifest does not say so soundly, or it takes a part that is not there.
        """
        tensor = self._tensors[aligned]
        if tensor.of is not None and not self.manifest.tasks[task].is_kept:
            return self.stored_as(task, tensor.of)
        return stored_as(self._described(task, tensor), self._parts[task])

    def _described(self, task: str, tensor: TensorEntry) -> Described:
        """Return what the manifest says about an entry."""
        entry, unit = self.manifest.tasks[task], self._units.get(tensor.name)
        groups = unit.groups if unit is not None and not entry.is_kept else ()
        group = next((group for group in groups if task in group.tasks), None)
        tasks = (task,) if group is None else group.tasks
        described = Described(
            form="copy" if group is None else group.kind,
            tensor=tensor.name,
            task=task,
            shape=tensor.shape_of(task),
            tasks=tasks,
            dtypes=tuple(map(tensor.dtype_of, tasks)),
            dense=self._dense[task].get(tensor.name),
            unit="" if unit is None or group is None else unit.name,
            bits=None if group is None else group.bits,
            method=None if group is None or group.method is None else self._methods[group.method],
        )
        return entry.described(described, lambda: file_inside(self.path, str(self.manifest.own_weights(task))))

    def parts_of(self, task: str) -> RouteParts:
        """Return all parts on a task's route."""
        return self._parts[task]

    def whole(self, task: str, aligned: str) -> Stored:
        """Return how a task's whole tensor is stored: rows and parts of one tensor are joined.

        Raises as stored_as.
        """
        split, rows = self._splits.get(aligned), self.manifest.rows_of(aligned, task)
        if split is None and rows is None:
            return self.stored_as(task, aligned)
        if split is not None:
            form, names = "split", split.names
        else:
            assert rows is not None
            own = f"{self._tensors[aligned].of or aligned}{ROWS_SUFFIX}"
            form, names = "joined", (aligned, own) if rows.has_own else (aligned,)
        dtype, shape = self.tensor_of(task, aligned)
        described = Described(
            form=form,
            tensor=aligned,
            task=task,
            shape=shape,
            tasks=(task,),
            dtypes=(dtype,),
            pieces=tuple(self.stored_as(task, name) for name in names),
            dim=split.dim if split is not None else 0,
            common=rows.common if rows is not None else (),
        )
        return stored_as(described, self._parts[task])

    def packed(self, task: str, aligned: str) -> Packable | None:
        """Return how a tensor is stored if any of its rows can be decoded alone; None if it is dense, or stored
        otherwise."""
        found = self.whole(task, aligned)
        return found.packable if found.dense is None else None

    def is_shared(self, task: str, aligned: str) -> bool:
        """Return whether the tensor is exactly the bits of one part, so that a view can refer to the mapped file."""
        return self.whole(task, aligned).is_plain

    def identity(self, task: str, aligned: str) -> tuple[str, ...]:
        """Return a key that is equal for two tensors with the same bits, dtype and shape that are stored once."""
        if (split := self._splits.get(aligned)) is not None:
            return tuple(word for name in split.names for word in self.identity(task, name))
        tensor = self._tensors[aligned]
        if tensor.of is not None:
            return self.identity(task, tensor.of)
        if self.manifest.rows_of(aligned, task) is not None:
            return aligned, task
        form = aligned, tensor.dtype_of(task), str(tensor.shape_of(task))
        experts = self.stored_as(task, aligned).experts(self._parts[task])  # What tasks of one group have in common.
        return (
            (*form, tensor.digests[task]) if experts is None else (*form, *(left.name for left, _ in experts.factors))
        )

    def is_tied(self, aligned: str) -> bool:
        return aligned not in self._splits and self._tensors[aligned].of is not None

    def check_route(self, task: str) -> None:
        """Check that every tensor of a task can be decoded: its parts are there, with the dtype and size that it
        needs."""
        for tensor in self._entries[task]:
            if tensor.of is None and not self.stored_as(task, tensor.name).fits(self._parts[task]):
                raise DataError(
                    f"{self.path}: `{tensor.name}` of `{task}` is stored in another size or dtype than it is given",
                    hint="fetch it again",
                )
