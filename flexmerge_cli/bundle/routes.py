"""Which parts make which tensor of which task. Reads nothing; what can be decoded is known from names and shapes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexmerge_cli.allocation.manifest import AdapterEntry, GroupEntry, Manifest, RowsEntry, TensorEntry, UnitEntry
from flexmerge_cli.bundle.residual import StoredResidual, stored_residual
from flexmerge_cli.checkpoint.dtypes import FLOATING
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.residuals import mask as masks


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """A manifest, and the parts of the files that are there."""

    path: Path
    """The bundle's, for errors."""
    manifest: Manifest
    parts: Mapping[str, Mapping[str, StoredTensor]]
    """File -> part name -> where it lies."""
    _units: dict[str, UnitEntry] = field(init=False)
    _tensors: dict[str, TensorEntry] = field(init=False)
    _rows: dict[tuple[str, str], RowsEntry] = field(init=False)
    """(task, aligned name) of tensors that are put together from rows."""
    _dense: dict[str, dict[str, StoredTensor]] = field(init=False)
    """Task -> aligned name -> the dense part."""
    _coded: dict[str, dict[str, StoredTensor]] = field(init=False)
    """Task -> part name -> part, of all parts on its route."""

    def __post_init__(self) -> None:
        manifest = self.manifest
        dense: dict[str, dict[str, StoredTensor]] = {task: {} for task in manifest.tasks}
        coded: dict[str, dict[str, StoredTensor]] = {task: {} for task in manifest.tasks}
        for name, found in self.parts.items():
            readers = manifest.files[name].tasks
            names = manifest.tasks[readers[0]].names  # dense parts have the names of the first reader
            plain = {
                tensor.name: found[own]
                for tensor in manifest.stored
                if readers[0] in tensor.digests and (own := names.get(tensor.name, tensor.name)) in found
            }
            for task in readers:
                dense[task] |= plain
                coded[task] |= found
        rows = {
            (task, name): rows
            for vocabulary in manifest.vocabularies
            for task, rows in vocabulary.tasks.items()
            for name in vocabulary.tensors
        }
        object.__setattr__(self, "_units", {name: unit for unit in manifest.units for name in unit.tensors})
        object.__setattr__(self, "_tensors", {tensor.name: tensor for tensor in manifest.stored})
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_dense", dense)
        object.__setattr__(self, "_coded", coded)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.manifest.tasks)

    def _shape(self, tensor: TensorEntry, task: str) -> tuple[int, ...]:
        rows = self._rows.get((task, tensor.name))
        return tensor.shape_of(task) if rows is None else (rows.rows, *tensor.shape_of(task)[1:])

    def coded(self, task: str, aligned: str) -> StoredResidual | None:
        """How a tensor is stored as a centre and residuals; None of what is stored otherwise, or put together."""
        tensor = self._tensors[self._tensors[aligned].of or aligned]
        is_apart = (task, aligned) in self._rows or self.manifest.tasks[task].adapter is not None
        if is_apart or tensor.name in self._dense[task]:
            return None
        group = self._group(task, tensor.name)
        return self._residual(tensor, group, task) if group.kind == "residual" else None

    def dense(self, task: str, aligned: str) -> StoredTensor | None:
        """The part that holds a tensor as it is, or in a wider dtype; None if it must be decoded, or put together."""
        is_apart = (task, aligned) in self._rows or self.manifest.tasks[task].adapter is not None
        return None if is_apart else self._dense[task].get(aligned)

    def is_tied(self, aligned: str) -> bool:
        return self._tensors[aligned].of is not None

    def _base(self, task: str, tensor: TensorEntry) -> StoredTensor:
        """The base's bits on an adapter's route."""
        own = self._coded[task].get(f"{tensor.name}@base") or self._dense[task].get(tensor.name)
        return own or self._part(task, f"{tensor.name}@base")

    def _residual(self, tensor: TensorEntry, group: GroupEntry, task: str) -> StoredResidual:
        return stored_residual(self.manifest, tensor, group, task, self._coded[task])

    def _part(self, task: str, name: str) -> StoredTensor:
        part = self._coded[task].get(name)
        if part is None:
            raise DataError(f"{self.path}: `{name}` is on no file of task `{task}`", hint="fetch the bundle again")
        return part

    def _gamma(self, task: str, aligned: str) -> StoredTensor | None:
        """The factor of a masked tensor, where its method has one."""
        return self._coded[task].get(f"{self._units[aligned].name}@gamma.{task}")

    def check_route(self, task: str) -> None:
        """Every tensor of a task can be decoded: its parts are there, of the dtype and size that it needs."""
        adapter = self.manifest.tasks[task].adapter
        for tensor in self.manifest.stored:
            if tensor.of is not None or task not in tensor.digests:
                continue
            if adapter is not None:
                self._check_adapted(tensor, task, adapter)
                continue
            dense = self._dense[task].get(tensor.name)
            if dense is None and tensor.name not in self._units:
                raise DataError(f"{self.path}: `{tensor.name}` is in no file of `{task}`", hint="fetch it again")
            if not (self._casts(tensor, task, dense) if dense is not None else self._decodes(tensor, task)):
                raise DataError(
                    f"{self.path}: `{tensor.name}` of `{task}` is stored in another size or dtype than it is given",
                    hint="fetch it again",
                )

    def _check_adapted(self, tensor: TensorEntry, task: str, adapter: AdapterEntry) -> None:
        change = adapter.changes.get(tensor.name)
        if change is not None and change.value is not None:
            return  # the manifest's own check has its place in the file
        base = self._base(task, tensor)
        if (base.dtype, base.num_elements) != (tensor.dtype_of(task), math.prod(tensor.shape_of(task))):
            raise DataError(
                f"{self.path}: `{tensor.name}` of `{task}` is stored in another size or dtype than it is given",
                hint="fetch it again",
            )

    def _casts(self, tensor: TensorEntry, task: str, dense: StoredTensor) -> bool:
        dtypes = {dense.dtype, tensor.dtype_of(task)}
        return dense.num_elements == math.prod(tensor.shape_of(task)) and (len(dtypes) == 1 or dtypes <= set(FLOATING))

    def _group(self, task: str, aligned: str) -> GroupEntry:
        found = next((group for group in self._units[aligned].groups if task in group.tasks), None)
        if found is None:
            raise DataError(f"{self.path}: `{aligned}` has no group of task `{task}`", hint="fetch the bundle again")
        return found

    def _decodes(self, tensor: TensorEntry, task: str) -> bool:
        group = self._group(task, tensor.name)
        if group.kind == "residual":
            if not {tensor.dtype_of(name) for name in group.tasks} <= set(FLOATING):
                return False
            stored = self._residual(tensor, group, task)
            base_fits = True
            if stored.base:
                base = self._part(task, f"{tensor.name}@base")
                base_fits = base.dtype in FLOATING and base.num_elements == math.prod(tensor.shape_of(task))
            return base_fits and all(
                (self._part(task, name).dtype, self._part(task, name).shape) == (array.dtype, array.shape)
                for name, array in stored.parts().items()
            )
        base, unified = self._part(task, f"{tensor.name}@base"), self._part(task, f"{tensor.name}@unified")
        mask, gamma = self._part(task, f"{tensor.name}@mask.{task}"), self._gamma(task, tensor.name)
        count = math.prod(tensor.shape_of(task))
        return (
            {base.dtype, unified.dtype, tensor.dtype_of(task)} <= set(FLOATING)
            and (mask.dtype, mask.shape) == ("U8", (masks.packed_bytes(count),))
            and (base.num_elements, unified.num_elements) == (count, count)
            and (gamma is None or (gamma.dtype, gamma.num_elements) == ("F32", 1))
        )
