"""Writes parts to pre-sized weight files, whose digests it computes on the way, or to memory."""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import xxhash

from flexmerge_cli.allocation.files import WeightFile
from flexmerge_cli.allocation.storage import Part
from flexmerge_cli.checkpoint.digest import FileDigests, FileHash
from flexmerge_cli.checkpoint.open_files import open_one_more
from flexmerge_cli.engine.pool import aligned
from flexmerge_cli.errors import MachineError
from flexmerge_cli.writing import NOT_SUPPORTED, cannot_write, sync

READ_BACK_BYTES = 4 << 20
# After this many bytes, a file is forced to disk while others compute; forcing all at the end took a fifth of a merge's
# time.
FLUSH_BYTES = 32 << 20
OTHER_FILES = 1000  # files of the sources and of Python that are open meanwhile


class Sink(Protocol):
    """What the engine writes to; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def write(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        """Write a part's bytes from start_byte on. data: uint8, contiguous. May be called from any thread."""

    def hashed(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        """Take what `write` wrote for hashing, in the order of the run, from one thread."""

    def finish(self) -> dict[str, FileDigests]:
        """Finish after the last byte, and return the digests of each file by its path."""


class MemoryOutput:
    """Holds some parts in memory, uint8 each; what is written to others is dropped."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.arrays = {part: aligned(part.num_bytes) for part in parts}
        self._left = {part: part.num_bytes for part in self.arrays}
        self._lock = threading.Lock()

    def __enter__(self) -> "MemoryOutput":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def write(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        if part in self.arrays:
            self.arrays[part][start_byte : start_byte + data.size] = data
            with self._lock:
                self._left[part] -= data.size

    def hashed(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        pass

    def finish(self) -> dict[str, FileDigests]:
        assert all(left <= 0 for left in self._left.values()), "a part was not written"
        return {}


class Output:
    """The weight files of a bundle that is being written; a context manager. `write` may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[WeightFile],
        total_bytes: int,
        *,
        resumes: bool = False,
        known: Mapping[Part, Callable[[], Iterator[np.ndarray]]] | None = None,
    ) -> None:
        """Prepare the files. resumes: they may exist already, with parts that can be kept.

        known: parts whose bytes are not computed, and functions that yield these, uint8, in order. Whatever is written
        to them, or to parts of no file, is dropped.
        """
        self._known = known or {}
        self._resumes = resumes
        self._folder, self._files, self._total_bytes = folder, files, total_bytes
        self._descriptors: list[int] = []
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flexmerge-flush")
        self._flush: Future[None] | None = None
        self._unflushed = [0] * len(files)
        self._hashes = [_FileHash(file.num_bytes) for file in files]
        self._place: dict[Part, tuple[int, int]] = {
            part: (number, offset)
            for number, file in enumerate(files)
            for part, offset in zip(file.parts, file.offsets(), strict=True)
        }

    def __enter__(self) -> Self:
        try:
            for number, file in enumerate(self._files):
                self._create(self._folder / file.path, file.num_bytes)
                self._pwrite(number, np.frombuffer(file.header, np.uint8), 0)
                self._digested(number, 0, np.frombuffer(file.header, np.uint8))
            for part, pieces in self._known.items():
                number, offset = self._place.pop(part)
                for data in pieces():
                    self._pwrite(number, data, offset)
                    self._digested(number, offset, data)
                    offset += data.size
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._flusher.shutdown()
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):  # `finish` has forced everything to disk, or has failed
                os.close(descriptor)
        self._descriptors = []

    def write(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        """Write a part's bytes from start_byte on. data: uint8, contiguous."""
        if part in self._place:
            number, offset = self._place[part]
            self._pwrite(number, data, offset + start_byte)

    def hashed(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        """Take what `write` wrote for hashing, in the order of the run, from one thread."""
        if part not in self._place:
            return
        number, offset = self._place[part]
        self._digested(number, offset + start_byte, data)
        self._unflushed[number] += data.size
        if self._unflushed[number] >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._flushed()
            self._unflushed[number] = 0
            self._flush = self._flusher.submit(self._force, number)

    def digest(self, part: Part) -> str:
        """Return the xxh3 of the bytes in its file at the place of a part."""
        number, offset = self._place[part]
        found, end = xxhash.xxh3_128(), offset + part.num_bytes
        while offset < end:
            data = os.pread(self._descriptors[number], min(READ_BACK_BYTES, end - offset), offset)
            found.update(data)
            offset += len(data)
        return found.hexdigest()

    def keep(self, part: Part) -> None:
        """Keep a part as it lies in its file: it is not written again."""
        number, offset = self._place[part]
        self._hashes[number].keep(self._descriptors[number], offset, part.num_bytes)

    def finish(self) -> dict[str, FileDigests]:
        """Force everything to disk, and return the digests of each file by its path."""
        self._flushed()
        for number in range(len(self._files)):
            self._force(number)
        return self._digests()

    def _digested(self, number: int, offset: int, data: np.ndarray) -> None:
        self._hashes[number].add(self._descriptors[number], offset, data)

    def _digests(self) -> dict[str, FileDigests]:
        return {
            file.path: taken.finish(descriptor)
            for file, taken, descriptor in zip(self._files, self._hashes, self._descriptors, strict=True)
        }

    def _create(self, path: Path, num_bytes: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            how = os.O_NOFOLLOW if self._resumes else os.O_EXCL
            descriptor = open_one_more(os.open, path, os.O_RDWR | os.O_CREAT | how, 0o666)
            self._descriptors.append(descriptor)
            if self._resumes:
                os.ftruncate(descriptor, num_bytes)
            _reserve(descriptor, num_bytes)
        except OSError as error:
            raise self._failed(error, path) from None

    def _flushed(self) -> None:
        """Wait for the last flush. A disk reports only once what it could not store, so the error is raised here."""
        if self._flush is not None:
            self._flush.result()

    def _force(self, number: int) -> None:
        try:
            sync(self._descriptors[number])
        except OSError as error:
            raise self._failed(error, self._folder / self._files[number].path) from None

    def _pwrite(self, number: int, data: np.ndarray, offset: int) -> None:
        view = data.data
        while len(view):
            try:
                count = os.pwrite(self._descriptors[number], view, offset)
            except OSError as error:
                raise self._failed(error, self._folder / self._files[number].path) from None
            view, offset = view[count:], offset + count

    def _failed(self, error: OSError, path: Path) -> MachineError:
        if error.errno == errno.EMFILE:
            needed = len(self._files) + OTHER_FILES
            return MachineError(f"{path} is one open file too many", hint=f"raise the limit: ulimit -n {needed}")
        return cannot_write(error, path, self._total_bytes)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Set a file's size, and reserve its blocks if the file system can, so that a full disk is noticed at once."""
    try:
        if num_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)
            return
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    os.ftruncate(descriptor, num_bytes)


class PartOutput(Output):
    """Writes some parts of weight files while other processes write the others. The files are not digested."""

    def __init__(self, folder: Path, files: Sequence[WeightFile], total_bytes: int) -> None:
        super().__init__(folder, files, total_bytes, resumes=True)

    def _digested(self, number: int, offset: int, data: np.ndarray) -> None:
        pass

    def keep(self, part: Part) -> None:
        pass

    def _digests(self) -> dict[str, FileDigests]:
        return {}


class _FileHash:
    """The digests of a file that is mostly written front to back; what comes early is read back when its turn comes."""

    def __init__(self, num_bytes: int) -> None:
        self._hash = FileHash()
        self._num_bytes = num_bytes
        self._position = 0
        self._early: dict[int, int] = {}

    def add(self, descriptor: int, offset: int, data: np.ndarray) -> None:
        if offset != self._position:
            self._early[offset] = data.size
            return
        self._hash.update(data.data)
        self._position += data.size
        self._read_early(descriptor)

    def keep(self, descriptor: int, offset: int, num_bytes: int) -> None:
        """Count bytes that lie in the file already as written."""
        if num_bytes:
            self._early[offset] = num_bytes
            self._read_early(descriptor)

    def _read_early(self, descriptor: int) -> None:
        while self._position in self._early:
            self._read_back(descriptor, self._early.pop(self._position))

    def finish(self, descriptor: int) -> FileDigests:
        assert self._position == self._num_bytes and not self._early, "a part was not written"
        return self._hash.digests()

    def _read_back(self, descriptor: int, num_bytes: int) -> None:
        end = self._position + num_bytes
        while self._position < end:
            data = os.pread(descriptor, min(READ_BACK_BYTES, end - self._position), self._position)
            self._hash.update(data)
            self._position += len(data)
