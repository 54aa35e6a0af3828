"""A bundle on disk: its manifest, its files' headers, and any task's tensors as numpy bits. Needs no torch.

Opening checks paths, headers and sizes; digests only `verify.py` does. A part is mapped, never copied: two tasks that
share a group get the same memory.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flexmerge_cli.allocation.manifest import (
    BASE_FOLDER,
    AdapterEntry,
    GroupEntry,
    Manifest,
    RowsEntry,
    TensorEntry,
    UnitEntry,
)
from flexmerge_cli.allocation.plan_file import ROWS_SUFFIX
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, file_inside, read_manifest, sha256_of
from flexmerge_cli.bundle.residual import StoredResidual, stored_residual
from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.dtypes import FLOATING, NUMPY, from_float32, to_float32
from flexmerge_cli.checkpoint.open_files import open_one_more
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.remote import RangeFile, RemoteFile
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, IntegrityError, SourceError
from flexmerge_cli.methods.registry import format_call
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.residuals.rows import join


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An open bundle. Made by `Bundle.open`."""

    path: Path
    manifest: Manifest
    parts: Mapping[str, Mapping[str, StoredTensor]]
    """File -> part name -> where it lies."""
    _units: dict[str, UnitEntry]
    _tensors: dict[str, TensorEntry]
    _rows: dict[tuple[str, str], RowsEntry]
    """(task, aligned name) of tensors that are put together from rows."""
    _dense: dict[str, dict[str, StoredTensor]]
    """Task -> aligned name -> the dense part."""
    _coded: dict[str, dict[str, StoredTensor]]
    """Task -> part name -> part, of all parts on its route."""
    _maps: dict[Path, np.ndarray] = field(default_factory=dict)
    _sound: set[str] = field(default_factory=set)
    """Files whose digests were compared with the manifest."""

    @property
    def methods(self) -> list[str]:
        """Each with its steps, its calibration, and where it comes from if it is not flexmerge's own."""
        found = []
        for method in self.manifest.methods:
            parts = [format_call(method.name, method.args), *(f"step {step}" for step in method.steps)]
            parts += [f"calibrate {method.calibrate}"] if method.calibrate else []
            parts += [f"from {' '.join(method.origin)}"] if method.origin else []
            found.append(" + ".join(parts))
        return found

    @property
    def manifest_bytes(self) -> int:
        return (self.path / MANIFEST_NAME).stat().st_size

    @property
    def total_bytes(self) -> int:
        """Of every file, as an upload counts; also of those that are not on this disk."""
        return self.manifest_bytes + sum(file.bytes for file in self.manifest.files.values())

    @staticmethod
    def open(
        path: Path, *, tasks: Collection[str] | None = None, remote: Mapping[str, RemoteFile] | None = None
    ) -> "Bundle":
        """Raises SourceError if there is none, DataError if malformed, IntegrityError if a file is missing or cut.

        tasks: whose files are needed; None: of all. remote: files that are not on this disk, of which headers alone
        are read: such a bundle can be looked at, and not read from.
        """
        manifest = read_manifest(path)
        tasks, remote = manifest.tasks if tasks is None else tasks, remote or {}
        problems, parts = [], {}
        for name, entry in manifest.files.items():
            file = file_inside(path, name)
            if not set(tasks) & set(entry.tasks):
                continue
            if name in remote:
                if name.startswith("weights/"):
                    parts[name] = read_header(file, RangeFile(remote[name]))[0]
            elif not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != entry.bytes:
                problems.append(f"{name} has {file.stat().st_size:,} bytes, {entry.bytes:,} by the manifest")
            elif name.startswith("weights/"):
                parts[name] = read_header(file)[0]
        if problems:
            raise IntegrityError(
                f"{path} is not whole:\n  " + "\n  ".join(problems), hint="fetch the bundle again, or merge again"
            )
        bundle = Bundle.of(path, manifest, parts)
        bundle._check_routes(tasks)
        return bundle

    @staticmethod
    def of(
        path: Path,
        manifest: Manifest,
        parts: Mapping[str, Mapping[str, StoredTensor]],
        maps: dict[Path, np.ndarray] | None = None,
    ) -> "Bundle":
        """Of a manifest and parts that are known to fit. maps: bytes of files that need not be on disk."""
        dense: dict[str, dict[str, StoredTensor]] = {task: {} for task in manifest.tasks}
        coded: dict[str, dict[str, StoredTensor]] = {task: {} for task in manifest.tasks}
        for name, found in parts.items():
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
        return Bundle(
            path=path,
            manifest=manifest,
            parts=parts,
            _units={name: unit for unit in manifest.units for name in unit.tensors},
            _tensors={tensor.name: tensor for tensor in manifest.stored},
            _rows={
                (task, name): rows
                for vocabulary in manifest.vocabularies
                for task, rows in vocabulary.tasks.items()
                for name in vocabulary.tensors
            },
            _dense=dense,
            _coded=coded,
            _maps={} if maps is None else maps,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.manifest.tasks)

    def check_task(self, task: str) -> None:
        if task not in self.manifest.tasks:
            raise SourceError(f"no task `{task}` in {self.path}", hint=f"it has: {', '.join(self.tasks)}")

    def check_files(self, task: str, *, weights: bool = True) -> None:
        """Compare every file that a task reads with the manifest, each file once; without weights its side files alone.

        Raises IntegrityError that names all files that differ.
        """
        self.check_task(task)
        bad = []
        for name in self.manifest.tasks[task].files:
            if name in self._sound or (not weights and name.endswith(WEIGHT_SUFFIXES)):
                continue
            if sha256_of(file_inside(self.path, name)) == self.manifest.files[name].sha256:
                self._sound.add(name)
            else:
                bad.append(name)
        if bad:
            raise IntegrityError(
                f"{self.path} is damaged: the digest of {', '.join(bad)} differs from the manifest's",
                hint="fetch the bundle again, or merge again",
            )

    def route(self, task: str) -> list[str]:
        """Weight files that a task reads."""
        self.check_task(task)
        return [name for name in self.parts if task in self.manifest.files[name].tasks]

    def tensors_of(self, task: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Own name -> (dtype, shape), in the order of the base's files."""
        self.check_task(task)
        names = self.manifest.tasks[task].names
        return {
            names.get(tensor.name, tensor.name): (tensor.dtype_of(task), self._shape(tensor, task))
            for tensor in self.manifest.tensors
            if task in tensor.digests
        }

    def aligned_name(self, task: str, own: str) -> str:
        """Raises KeyError."""
        for aligned, name in self.manifest.tasks[task].names.items():
            if name == own:
                return aligned
        if own in self._tensors and own not in self.manifest.tasks[task].names:
            return own
        raise KeyError(own)

    def _shape(self, tensor: TensorEntry, task: str) -> tuple[int, ...]:
        rows = self._rows.get((task, tensor.name))
        return tensor.shape_of(task) if rows is None else (rows.rows, *tensor.shape_of(task)[1:])

    def array(self, task: str, aligned: str) -> np.ndarray:
        """A task's tensor as bits (`NUMPY[dtype]`), in its own shape and dtype. Of a dense part a view of the file."""
        tensor = self._tensors[aligned]
        rows = self._rows.get((task, aligned))
        if rows is None:
            return self.stored(task, aligned)
        own = self.stored(task, f"{tensor.of or aligned}{ROWS_SUFFIX}") if rows.has_own else None
        return join(self.stored(task, aligned), own, rows.common, rows.rows)

    def stored(self, task: str, aligned: str) -> np.ndarray:
        """The same of what has an entry, and a digest, in the manifest: of a vocabulary the common rows, or `@rows`."""
        tensor = self._tensors[aligned]
        adapter = self.manifest.tasks[task].adapter
        if adapter is not None:
            return self._adapted(task, tensor, adapter)
        if tensor.of is not None:
            return self.stored(task, tensor.of)
        dtype, shape = tensor.dtype_of(task), tensor.shape_of(task)
        dense = self._dense[task].get(aligned)
        if dense is not None:
            return _cast(self.bits(dense), dense.dtype, dtype).reshape(shape)
        group = self._group(task, aligned)
        if group.kind == "residual":
            return self._residual(tensor, group, task).decode(self.part_bits(task)).reshape(shape)
        base, unified = self._part(task, f"{aligned}@base"), self._part(task, f"{aligned}@unified")
        packed = self._part(task, f"{aligned}@mask.{task}")
        gamma = self._gamma(task, aligned)
        factor = np.float32(1.0) if gamma is None else self.bits(gamma)[0]
        try:
            taken = masks.unpack(self.bits(packed), unified.num_elements)
        except ValueError as error:
            raise DataError(f"{self.path}: `{packed.name}`: {error}", hint="fetch the bundle again") from None
        decoded = masks.apply(
            to_float32(self.bits(base), base.dtype), to_float32(self.bits(unified), unified.dtype), taken, factor
        )
        return from_float32(decoded, dtype).reshape(shape)

    def coded(self, task: str, aligned: str) -> StoredResidual | None:
        """How a tensor is stored as a centre and residuals; None of what is stored otherwise, or put together."""
        tensor = self._tensors[self._tensors[aligned].of or aligned]
        is_apart = (task, aligned) in self._rows or self.manifest.tasks[task].adapter is not None
        if is_apart or tensor.name in self._dense[task]:
            return None
        group = self._group(task, tensor.name)
        return self._residual(tensor, group, task) if group.kind == "residual" else None

    def part_bits(self, task: str) -> Callable[[str], tuple[str, np.ndarray]]:
        """Name of a part on the task's route -> its dtype and `bits`."""

        def found(name: str) -> tuple[str, np.ndarray]:
            part = self._part(task, name)
            return part.dtype, self.bits(part)

        return found

    def bits(self, part: StoredTensor) -> np.ndarray:
        """A part's elements, one axis, mapped; private to this process where written to."""
        if part.path not in self._maps:
            self._maps[part.path] = open_one_more(np.memmap, part.path, np.uint8, mode="c")
        data = self._maps[part.path][part.offset : part.offset + part.num_bytes]
        return np.asarray(data).view(NUMPY[part.dtype])

    def dense(self, task: str, aligned: str) -> StoredTensor | None:
        """The part that holds a tensor as it is, or in a wider dtype; None if it must be decoded, or put together."""
        is_apart = (task, aligned) in self._rows or self.manifest.tasks[task].adapter is not None
        return None if is_apart else self._dense[task].get(aligned)

    def is_tied(self, aligned: str) -> bool:
        return self._tensors[aligned].of is not None

    def is_shared(self, task: str, aligned: str) -> bool:
        """Whether `array` is a view of the file: a dense part in the task's own dtype."""
        tensor = self._tensors[aligned]
        adapter = self.manifest.tasks[task].adapter
        if adapter is not None:
            return aligned not in adapter.changes
        dense = self.dense(task, tensor.of or aligned)
        return dense is not None and dense.dtype == tensor.dtype_of(task)

    def config_folder(self, task: str) -> Path:
        """Where a task's config and tokenizer lie; of a kept adapter that has none of its own, the base's."""
        folder = self.path / "tasks" / task
        has_own = self.manifest.tasks[task].adapter is None or (folder / "config.json").is_file()
        return folder if has_own else self.path / BASE_FOLDER

    def adapter_file(self, task: str) -> Path | None:
        """The weight file of a kept adapter."""
        adapter = self.manifest.tasks[task].adapter
        return None if adapter is None else file_inside(self.path, f"tasks/{task}/{adapter.weights}")

    def _adapted(self, task: str, tensor: TensorEntry, adapter: AdapterEntry) -> np.ndarray:
        """What a kept adapter makes of a tensor; the base's bits, mapped, where it leaves it."""
        change, shape = adapter.changes.get(tensor.name), tensor.shape_of(task)
        weights = self.adapter_file(task)
        assert weights is not None
        if change is None:
            return self.bits(self._base(task, tensor)).reshape(shape)
        base = None if change.value is not None else self._base(task, tensor)
        stored = replace(change.tensor(base, weights), shape=shape)
        with Reader() as reader:
            data = reader.read(stored, 0, stored.num_elements, np.empty(stored.num_bytes, np.uint8))
        return data.view(NUMPY[stored.dtype]).reshape(shape)

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

    def _check_routes(self, tasks: Collection[str]) -> None:
        """Every tensor of these tasks can be decoded: its parts are there, of the dtype and size that it needs."""
        for tensor in self.manifest.stored:
            for task in [name for name in tensor.digests if name in tasks] if tensor.of is None else ():
                adapter = self.manifest.tasks[task].adapter
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


def _cast(bits: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    if dtype == wanted:
        return bits
    if "F64" in (dtype, wanted):
        return (
            bits.astype(np.float64)
            if wanted == "F64" and dtype != "BF16"
            else from_float32(to_float32(bits, dtype), wanted)
        )
    return from_float32(to_float32(bits, dtype), wanted)
