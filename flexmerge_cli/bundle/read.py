"""A bundle on disk: its manifest, its files' headers, and any task's tensors as numpy bits. Needs no torch.

Opening checks paths, headers and sizes. A file's digest is compared when the file is first read (files.py). What is
wrong with a file concerns the tasks that read it, and no other.
"""

import math
from collections.abc import Collection, Mapping
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
from flexmerge_cli.bundle.files import BundleFiles, raise_together
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, file_inside, read_manifest, standing
from flexmerge_cli.bundle.residual import ALL, PartBits, StoredResidual, stored_residual
from flexmerge_cli.checkpoint.dtypes import FLOATING, NUMPY, from_float32, to_float32
from flexmerge_cli.checkpoint.remote import RangeFile, RemoteFile
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, FlexmergeError, IntegrityError, MachineError, SourceError
from flexmerge_cli.methods.registry import format_call
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.residuals.rows import join

WEIGHTS = "weights/"
MAX_LOOKS = 5


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
    files: BundleFiles | None
    """None of a bundle in memory."""
    _memory: Mapping[Path, np.ndarray]
    """Bytes of files that are not on disk."""
    _problems: dict[str, FlexmergeError] = field(default_factory=dict)
    """File, or task -> why it cannot be read."""

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
        path: Path,
        *,
        tasks: Collection[str] | None = None,
        remote: Mapping[str, RemoteFile] | None = None,
        verify: bool = True,
    ) -> "Bundle":
        """tasks: whose files are looked at, must be sound, and are held; None: all, and one at least must be sound.

        What is wrong with the others is raised where they are read. remote: files that are not on this disk, of which
        headers alone are read: such a bundle can be looked at, and not read from. verify: whether a file's sha256 is
        compared when the file is first read.
        Raises SourceError if there is no bundle, DataError if it is malformed, IntegrityError if a file is missing or
        cut, or the bundle is replaced again and again, MachineError if the disk fails.
        """
        bundle = Bundle.look(path, tasks=tasks, remote=remote, verify=verify)
        if tasks is not None:
            bundle.check_tasks(tasks)
            for task in tasks if not remote else ():
                bundle.hold(task)
        elif not bundle.sound_tasks:
            bundle.check_tasks(bundle.tasks)
        return bundle

    @staticmethod
    def look(
        path: Path,
        *,
        tasks: Collection[str] | None = None,
        remote: Mapping[str, RemoteFile] | None = None,
        verify: bool = True,
    ) -> "Bundle":
        """The same, whatever is wrong with its files. Raises only if there is no sound manifest."""
        for _ in range(MAX_LOOKS):
            place = standing(path)
            before = _inode(place / MANIFEST_NAME)
            try:
                manifest = read_manifest(place)
            except SourceError:
                if before is None:
                    raise
                continue  # moved away meanwhile
            bundle = _look(place, manifest, manifest.tasks if tasks is None else tasks, remote or {}, verify=verify)
            if before == _inode(place / MANIFEST_NAME):
                return bundle  # all that was looked at is of this manifest: a folder is published as a whole
        raise IntegrityError(f"{path} is replaced again and again while it is opened", hint="try again later")

    @staticmethod
    def of(
        path: Path,
        manifest: Manifest,
        parts: Mapping[str, Mapping[str, StoredTensor]],
        memory: Mapping[Path, np.ndarray] | None = None,
        files: BundleFiles | None = None,
    ) -> "Bundle":
        """Of a manifest and parts that are known to fit, on disk (files) or not (memory: the bytes of each path)."""
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
            files=files,
            _memory={} if memory is None else memory,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.manifest.tasks)

    @property
    def sound_tasks(self) -> tuple[str, ...]:
        """Tasks whose files are there, of the right size, with headers and parts as the manifest has them."""
        return tuple(task for task in self.tasks if task not in self._problems and not self._bad_files([task]))

    def check_task(self, task: str) -> None:
        """Raises SourceError if there is no such task, otherwise as check_tasks."""
        self.check_tasks([task])

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Raises what was found wrong, when the bundle was opened, with the files of these tasks, all at once."""
        for task in tasks:
            if task not in self.manifest.tasks:
                raise SourceError(f"no task `{task}` in {self.path}", hint=f"it has: {', '.join(self.tasks)}")
        of_tasks = [self._problems[task] for task in tasks if task in self._problems]
        raise_together(self.path, [*self._bad_files(tasks).values(), *of_tasks])

    def problem(self, name: str) -> FlexmergeError | None:
        """What was found wrong with a file, or a task, when the bundle was opened."""
        return self._problems.get(name)

    def check_files(self, task: str, *, weights: bool = True) -> None:
        """Digest every file of a task's route and every side file of it, each once as long as the bundle is open.

        Also sees that none was replaced since the bundle was opened: where side files are read by their paths, call it
        before and after. weights=False: the side files alone. A bundle that was opened with verify=False has no digests
        compared, and one in memory has nothing to check.
        Raises IntegrityError that names all files that differ, with both digests; MachineError if one cannot be read.
        """
        self.check_task(task)
        if self.files is not None:
            of_weights = self._weight_files(task)
            self.files.check(name for name in self.manifest.tasks[task].files if weights or name not in of_weights)

    def hold(self, task: str) -> None:
        """Keep the weight files of a task's route open, to be read even if the bundle is replaced or removed."""
        self.check_task(task)
        if self.files is not None:
            self.files.hold(self._weight_files(task))

    def _bad_files(self, tasks: Collection[str]) -> dict[str, FlexmergeError]:
        entries, readers = self.manifest.files, set(tasks)
        return {
            name: error
            for name, error in self._problems.items()
            if name in entries and readers & set(entries[name].tasks)
        }

    @property
    def _on_disk(self) -> BundleFiles:
        assert self.files is not None
        return self.files

    def _weight_files(self, task: str) -> list[str]:
        """Names of the files that hold a task's tensors."""
        entry = self.manifest.tasks[task]
        adapter = [] if entry.adapter is None else [f"tasks/{task}/{entry.adapter.weights}"]
        return [name for name in entry.files if name.startswith(WEIGHTS)] + adapter

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

    def array(self, task: str, aligned: str, *, shared: bool = False) -> np.ndarray:
        """A task's tensor as bits (`NUMPY[dtype]`), in its own shape and dtype, in memory of the caller's own.

        shared: where `is_shared`, a view of the mapped file instead, which all tasks of a group have in common.
        Raises IntegrityError if a file that this takes is not the manifest's, MachineError if it cannot be read.
        """
        tensor = self._tensors[aligned]
        rows = self._rows.get((task, aligned))
        if rows is None:
            return self.stored(task, aligned, shared=shared)
        own = self.stored(task, f"{tensor.of or aligned}{ROWS_SUFFIX}") if rows.has_own else None
        return join(self.stored(task, aligned), own, rows.common, rows.rows)

    def stored(self, task: str, aligned: str, *, shared: bool = False) -> np.ndarray:
        """The same of what has an entry, and a digest, in the manifest: of a vocabulary the common rows, or `@rows`."""
        tensor = self._tensors[aligned]
        adapter = self.manifest.tasks[task].adapter
        if adapter is not None:
            return self._adapted(task, tensor, adapter, shared=shared)
        if tensor.of is not None:
            return self.stored(task, tensor.of, shared=shared)
        dtype, shape = tensor.dtype_of(task), tensor.shape_of(task)
        dense = self._dense[task].get(aligned)
        if dense is not None:
            found = self.mapped(dense) if shared and dense.dtype == dtype else self.bits(dense)
            return _cast(found, dense.dtype, dtype).reshape(shape)
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

    def part_bits(self, task: str) -> PartBits:
        """Reads parts on the task's route by their names."""

        def found(name: str, at: slice) -> tuple[str, np.ndarray]:
            part = self._part(task, name)
            return part.dtype, self.bits(part, at)

        return found

    def bits(self, part: StoredTensor, at: slice = ALL) -> np.ndarray:
        """Elements of a part, one axis, read into memory of the caller's own."""
        if part.path in self._memory:
            return self.mapped(part)[at].copy()
        start, stop, _ = at.indices(part.num_elements)
        return self._on_disk.read(part, start, stop)

    def mapped(self, part: StoredTensor) -> np.ndarray:
        """A part's elements, one axis, mapped; private to this process where written to. See BundleFiles.map."""
        whole = self._memory.get(part.path)
        if whole is None:
            whole = self._on_disk.map(part.path)
        return np.asarray(whole[part.offset : part.offset + part.num_bytes]).view(NUMPY[part.dtype])

    def dense(self, task: str, aligned: str) -> StoredTensor | None:
        """The part that holds a tensor as it is, or in a wider dtype; None if it must be decoded, or put together."""
        is_apart = (task, aligned) in self._rows or self.manifest.tasks[task].adapter is not None
        return None if is_apart else self._dense[task].get(aligned)

    def is_tied(self, aligned: str) -> bool:
        return self._tensors[aligned].of is not None

    def is_shared(self, task: str, aligned: str) -> bool:
        """Whether `array` can be a view of the file: a dense part in the task's own dtype."""
        tensor = self._tensors[aligned]
        adapter = self.manifest.tasks[task].adapter
        if adapter is not None:
            return aligned not in adapter.changes
        dense = self.dense(task, tensor.of or aligned)
        return dense is not None and dense.dtype == tensor.dtype_of(task)

    def config_folder(self, task: str) -> Path:
        """Where a task's config and tokenizer lie; of a kept adapter that has none of its own, the base's."""
        folder = self.path / "tasks" / task
        has_own = self.manifest.tasks[task].adapter is None or f"tasks/{task}/config.json" in self.manifest.files
        return folder if has_own else self.path / BASE_FOLDER

    def adapter_file(self, task: str) -> Path | None:
        """The weight file of a kept adapter."""
        adapter = self.manifest.tasks[task].adapter
        return None if adapter is None else file_inside(self.path, f"tasks/{task}/{adapter.weights}")

    def _adapted(self, task: str, tensor: TensorEntry, adapter: AdapterEntry, *, shared: bool) -> np.ndarray:
        """What a kept adapter makes of a tensor; the base's bits where it leaves it."""
        change, shape = adapter.changes.get(tensor.name), tensor.shape_of(task)
        weights = self.adapter_file(task)
        assert weights is not None
        if change is None:
            base = self._base(task, tensor)
            return (self.mapped(base) if shared else self.bits(base)).reshape(shape)
        base_part = None if change.value is not None else self._base(task, tensor)
        stored = replace(change.tensor(base_part, weights), shape=shape)
        return self._on_disk.read(stored, 0, stored.num_elements).reshape(shape)

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

    def _check_route(self, task: str) -> None:
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


def _look(
    path: Path, manifest: Manifest, tasks: Collection[str], remote: Mapping[str, RemoteFile], *, verify: bool
) -> Bundle:
    """Headers and sizes of the files of these tasks, and what is wrong with which."""
    files, problems = BundleFiles(path, manifest.files, verify=verify), dict[str, FlexmergeError]()
    parts: dict[str, Mapping[str, StoredTensor]] = {}
    for name, entry in manifest.files.items():
        if not set(tasks) & set(entry.tasks):
            continue
        try:
            if name not in remote:
                files.look(name)
            if name.startswith(WEIGHTS):
                parts[name] = read_header(path / name, RangeFile(remote[name]) if name in remote else None)[0]
        except OSError as error:
            problems[name] = files.unreadable(name, error)
        except MachineError as error:
            problems[name] = MachineError(f"{error.message}; {files.readers(name)}", hint=error.hint)
        except FlexmergeError as error:
            problems[name] = error
    bundle = replace(Bundle.of(path, manifest, parts, files=files), _problems=problems)
    for task in tasks:
        if task in manifest.tasks and not bundle._bad_files([task]):
            try:
                bundle._check_route(task)
            except DataError as error:
                problems[task] = error
    _blame_damage(bundle)
    return bundle


def _blame_damage(bundle: Bundle) -> None:
    """Where something does not fit because a file is damaged, say that."""
    for name, problem in list(bundle._problems.items()):
        suspects = [name] if name in bundle.manifest.files else bundle.manifest.tasks[name].files
        if isinstance(problem, DataError) and bundle.files is not None:
            try:
                bundle.files.check(suspects)
            except FlexmergeError as error:
                bundle._problems[name] = error


def _inode(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


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
