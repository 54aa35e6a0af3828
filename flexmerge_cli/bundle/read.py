"""Reads a bundle on disk: its manifest, its files' headers, and any task's tensors as numpy bits. Needs no torch.

Opening checks paths, headers and sizes. A file's digest is compared when the file is first read (files.py). What is
wrong with a file concerns the tasks that read it, and no other.
"""

import contextlib
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from flexmerge_cli.bundle.files import BundleFiles, Verify, raise_all
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, read_manifest, standing
from flexmerge_cli.bundle.routes import Routes
from flexmerge_cli.checkpoint.dtypes import NUMPY
from flexmerge_cli.checkpoint.remote import RangeFile, RemoteFile
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.checkpoint.urls import new_folder
from flexmerge_cli.errors import (
    DataError,
    FlexmergeError,
    IntegrityError,
    MachineError,
    SourceError,
    UsageError,
    show_as,
)
from flexmerge_cli.formats.folders import BASE_FOLDER, WEIGHTS
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.methods.registry import format_call
from flexmerge_cli.stored.decoding import ALL, Experts

MAX_LOOKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle(Routes):
    """An open bundle. Made by `Bundle.open`."""

    files: BundleFiles | None = None
    """None of a bundle in memory."""
    memory: Mapping[Path, np.ndarray] = field(default_factory=dict)
    """Bytes of paths that are not on disk."""
    joined: "WeakValueDictionary[Hashable, Any]" = field(default_factory=WeakValueDictionary, compare=False)
    """Parameters that models of several tasks have in common and that lie in no file (view.py)."""
    _problems: dict[str, FlexmergeError] = field(default_factory=dict)
    """File, or task -> why it cannot be read."""
    _linked: dict[str, Path] = field(default_factory=dict, compare=False)
    """Folder of a task that must be decoded -> the folder of links to its side files."""

    @property
    def methods(self) -> list[str]:
        """Return the methods, each with its steps, its calibration, and its origin if it is not flexmerge's own."""
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
        """The bytes of all files, as an upload counts them; those that are not on this disk are included."""
        return self.manifest_bytes + sum(file.bytes for file in self.manifest.files.values())

    @staticmethod
    def open(
        path: Path,
        *,
        tasks: Collection[str] | None = None,
        remote: Mapping[str, RemoteFile] | None = None,
        verify: Verify = "sha256",
    ) -> "Bundle":
        """Open a bundle. tasks: the tasks whose files are checked, must be sound, and are kept; None for all, one of
        which must be sound.

        Problems of the others are raised when they are read. remote: files that are not on this disk and whose headers
        alone are read: such a bundle can be inspected, but not read from. verify: the digest that is compared when a
        file is first read.
        Raises SourceError if there is no bundle, DataError if it is malformed, IntegrityError if a file is missing or
        truncated, or the bundle is replaced again and again, MachineError if the disk fails.
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
        verify: Verify = "sha256",
    ) -> "Bundle":
        """Open a bundle whatever is wrong with its files. Raises only if there is no sound manifest."""
        for _ in range(MAX_LOOKS):
            place = standing(path)
            before = _inode(place / MANIFEST_NAME)
            try:
                manifest = read_manifest(place)
            except SourceError:
                if before in (None, _inode(place / MANIFEST_NAME)):
                    raise
                continue  # moved away meanwhile
            bundle = _look(place, manifest, manifest.tasks if tasks is None else tasks, remote or {}, verify=verify)
            if before == _inode(place / MANIFEST_NAME):
                return bundle  # all that was looked at is of this manifest: a folder is published as a whole
        raise IntegrityError(f"{path} is replaced again and again while it is opened", hint="try again later")

    @property
    def sound_tasks(self) -> tuple[str, ...]:
        """The tasks whose files are there, of the right size, with headers and parts as in the manifest."""
        return tuple(task for task in self.tasks if task not in self._problems and not self._bad_files([task]))

    def check_task(self, task: str) -> None:
        """Raise SourceError if there is no such task, and otherwise what `check_tasks` raises."""
        self.check_tasks([task])

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Raise one error for all that was found wrong with the files of these tasks when the bundle was opened."""
        for task in tasks:
            if task not in self.manifest.tasks:
                raise SourceError(f"no task `{task}` in {self.path}", hint=f"it has: {', '.join(self.tasks)}")
        of_tasks = [self._problems[task] for task in tasks if task in self._problems]
        raise_all(self.path, [*self._bad_files(tasks).values(), *of_tasks])

    def problem(self, name: str) -> FlexmergeError | None:
        """Return what was found wrong with a file, or a task, when the bundle was opened."""
        return self._problems.get(name)

    def check_files(self, task: str, *, weights: bool = True) -> None:
        """Digest every file of a task's route and every side file of it, each once as long as the bundle is open.

        Also sees that none was replaced since the bundle was opened: where side files are read by their paths, call it
        before and after. weights=False: the side files alone. A bundle that was opened with verify="off" has no digests
        compared, and one in memory has nothing to check.
        Raises IntegrityError that names all files that differ, with both digests; MachineError if one cannot be read.
        """
        self.check_task(task)
        if self.files is not None:
            of_weights = self.manifest.weight_files(task)
            self.files.check(name for name in self.manifest.tasks[task].files if weights or name not in of_weights)

    @contextlib.contextmanager
    def checking(self, task: str) -> Iterator["Bundle"]:
        """Give this bundle, and digest the task's files while it is read; see BundleFiles.checking."""
        if self.files is None:
            yield self
            return
        with self.files.checking(self.manifest.weight_files(task)) as files:
            yield replace(self, files=files)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a file of the manifest from beginning to end, in chunks that are valid until the next one.

        Raises after the last byte if its SHA-256 differs.
        """
        return self._on_disk.chunks(name)

    def ahead(self, task: str) -> None:
        """Begin to digest the weight files of a task's route, where that has not been done; see BundleFiles.ahead."""
        if self.files is not None:
            self.files.ahead(self.manifest.weight_files(task))

    def hold(self, task: str) -> None:
        """Keep the weight files of a task's route open, to be read even if the bundle is replaced or removed."""
        self.check_task(task)
        if self.files is not None:
            self.files.hold(self.manifest.weight_files(task))

    def _bad_files(self, tasks: Collection[str]) -> dict[str, FlexmergeError]:
        names = {name for task in tasks for name in self.manifest.tasks[task].files if name in self._problems}
        return {name: self._problems[name] for name in sorted(names)}

    @property
    def _on_disk(self) -> BundleFiles:
        assert self.files is not None
        return self.files

    def route(self, task: str) -> list[str]:
        """Return the weight files that a task reads."""
        self.check_task(task)
        return [name for name in self.manifest.tasks[task].files if name in self.parts]

    def tensors_of(self, task: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Map own names to (dtype, shape), in the order of the base's files."""
        self.check_task(task)
        return {own: self.tensor_of(task, name) for own, name in self.manifest.aligned(task).items()}

    def array(self, task: str, aligned: str, *, shared: bool = False) -> np.ndarray:
        """Return a task's tensor as bits (`NUMPY[dtype]`), in its own shape and dtype, in memory of the caller's own.

        shared: of a dense part in the task's own dtype a view of the mapped file instead, which all tasks of a group
        have in common.
        Raises IntegrityError if a file that this takes is not the manifest's, MachineError if it cannot be read,
        UsageError for a layer that is a mixture of experts.
        """
        found = self.whole(task, aligned)
        if found.experts(self._parts[task]) is not None:
            raise self._no_tensor(task, aligned)
        return found.decode(self._parts[task], self.mapped if shared and found.is_plain else self.bits)

    def experts(self, task: str) -> dict[str, Experts]:
        """Map aligned names to the experts of the task's layers that are mixtures of them."""
        if not self.manifest.has_experts(task):
            return {}
        parts, names = self._parts[task], self.manifest.aligned(task).values()
        found = {name: self.whole(task, name).experts(parts) for name in names}
        return {name: experts for name, experts in found.items() if experts is not None}

    def require_tensors(self, task: str) -> None:
        """Raise UsageError if a layer of the task's model is a mixture of experts, or its inputs are corrected."""
        for name in self.experts(task):
            raise self._no_tensor(task, name)
        if self.manifest.surgery is not None and task in self.manifest.surgery.layers:
            raise UsageError(
                f"the input of the last layer of task `{task}` is corrected, which no tensor of an ordinary checkpoint "
                "can hold",
                hint=f'use the model itself: flexmerge_cli.open_bundle("{self.path}").model("{task}"), or the bundle '
                "without the correction",
            )

    def _no_tensor(self, task: str, aligned: str) -> UsageError:
        return UsageError(
            f"`{aligned}` of task `{task}` is a mixture of experts, which no tensor of an ordinary checkpoint can hold",
            hint=f'use the model itself: flexmerge_cli.open_bundle("{self.path}").model("{task}")',
        )

    def stored(self, task: str, aligned: str) -> np.ndarray:
        """Return what has an entry and a digest in the manifest: a tensor, or rows of one."""
        return self.stored_as(task, aligned).decode(self._parts[task], self.bits)

    def held(self, part: StoredTensor, at: slice = ALL) -> np.ndarray:
        """Return what `mapped` does, or a copy where that is not row by row, or not aligned."""
        return self.bits(part, at) if part.strides is not None else np.require(self.mapped(part, at), requirements="A")

    def bits(self, part: StoredTensor, at: slice = ALL) -> np.ndarray:
        """Read elements of a part, one axis, into memory of the caller's own."""
        if part.path in self.memory:
            return self.mapped(part)[at].copy()
        start, stop, _ = at.indices(part.num_elements)
        return self._on_disk.read(part, start, stop)

    def mapped(self, part: StoredTensor, at: slice = ALL) -> np.ndarray:
        """Map elements of a part; what is written to them stays in this process. See BundleFiles.map."""
        whole = self.memory.get(part.path)
        if whole is None:
            whole = self._on_disk.map(part.path)
        return np.asarray(whole[part.offset : part.offset + part.num_bytes]).view(NUMPY[part.dtype])[at]

    def config_folder(self, task: str) -> Path:
        """Return a folder with a task's config and tokenizer; for a kept adapter without its own, the base's.

        Where the weights beside them must be decoded, it is a folder for this process, of links under the files' names.
        """
        names, is_coded = self.manifest.side_files(task), self.manifest.is_coded(task)
        folder = self.manifest.side_folder(task)
        if self.manifest.tasks[task].is_kept and "config.json" not in names:
            names, is_coded, folder = self.manifest.base_files, self.manifest.is_base_coded, BASE_FOLDER
        if is_coded and folder not in self._linked:
            made = new_folder()
            show_as(made, str(self.path / folder))
            for name, path in names.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).symlink_to((self.path / path).absolute())
            self._linked[folder] = made
        return self._linked[folder] if is_coded else self.path / folder


def _look(
    path: Path, manifest: Manifest, tasks: Collection[str], remote: Mapping[str, RemoteFile], *, verify: Verify
) -> Bundle:
    """Return headers and sizes of the files of these tasks, and what is wrong with which of them."""
    files, problems = BundleFiles(path, manifest.files, verify=verify), dict[str, FlexmergeError]()
    parts: dict[str, Mapping[str, StoredTensor]] = {}
    wanted = set(tasks)
    for name, entry in manifest.files.items():
        if entry.tasks and wanted.isdisjoint(entry.tasks):
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
    bundle = Bundle(path=path, manifest=manifest, parts=parts, files=files, _problems=problems)
    for task in tasks:
        if task in manifest.tasks and not bundle._bad_files([task]):
            try:
                bundle.check_route(task)
            except DataError as error:
                problems[task] = error
    _blame_damage(bundle)
    return bundle


def _blame_damage(bundle: Bundle) -> None:
    """Say so where something does not fit because a file is damaged."""
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
