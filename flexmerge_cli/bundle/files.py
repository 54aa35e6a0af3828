"""The files of an open bundle: exactly those that were there when it was opened, each digested before it is used.

A file is known by device, inode, size and time of change. It is looked at when the bundle is opened, and compared
whenever it is opened again, so that a bundle put in its place meanwhile is never read by mistake. A file that is held
(kept open) can be read after it was replaced or removed. Knows neither tensors' meaning nor routes.

Digests find damage, not forgery. Damage that comes after a file was digested is not found by this reader.
"""

import contextlib
import copy
import hashlib
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from flexmerge_cli.checkpoint.digest import PIECE_BYTES
from flexmerge_cli.checkpoint.dtypes import NUMPY
from flexmerge_cli.checkpoint.open_files import open_one_more
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, FlexmergeError, IntegrityError, MachineError, machine_failure
from flexmerge_cli.formats.manifest_records import FileEntry

CHUNK_BYTES = 1 << 18  # stays in a core's cache between the disk's copy and the digest
SPAN_BYTES = 16 * PIECE_BYTES
MAX_THREADS = 8  # more than disks gain by
FETCH_AGAIN = "fetch the bundle again, or merge again"

Verify = Literal["sha256", "xxh3", "off"]
Identity = tuple[int, int, int, int]
"""Device, inode, bytes, time of change in ns."""


class DigestError(IntegrityError):
    """A file's SHA-256 is not the manifest's."""


class BundleFiles:
    """The files of one bundle. Names are paths below the bundle's folder, as in the manifest. Thread-safe."""

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry], *, verify: Verify = "sha256") -> None:
        """Set what is checked. verify: the digest of a file that is compared with the manifest's when it is first read.

        xxh3: it is nine times as fast; where the manifest lacks it, or it differs, the SHA-256 decides.
        """
        self._folder, self._entries, self._verify = folder, entries, verify
        self._names = {folder / name: name for name in entries}
        self._seen: dict[str, Identity] = {}
        self._digests: dict[Identity, str] = {}
        self._held: dict[str, int] = {}
        """Name -> descriptor."""
        self._maps: dict[str, np.ndarray] = {}
        self._lock = threading.RLock()
        self._ahead = set[str]()
        """Files that some thread has digested, or will."""
        self._turns: dict[str, threading.Lock] = {}
        """One lock per file that is being digested: whoever comes second waits, and need not do it again."""
        weakref.finalize(self, _close, self._held)

    def look(self, name: str) -> None:
        """Remember the file that is there now as the one to read.

        Raises IntegrityError if it is missing or of another size than the manifest's.
        """
        try:
            status = (self._folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            status = None
        except OSError as error:
            raise self.unreadable(name, error) from None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{self._folder / name} is missing", hint=FETCH_AGAIN)
        if status.st_size != self._entries[name].bytes:
            sizes = f"{status.st_size:,} bytes, {self._entries[name].bytes:,} by the manifest"
            raise IntegrityError(f"{self._folder / name} has {sizes}", hint=FETCH_AGAIN)
        self._seen[name] = _identity(status)

    def hold(self, names: Iterable[str]) -> None:
        """Keep files open, to be read whatever becomes of the folder. Reads nothing."""
        for name in names:
            self._hold(name)

    def read(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        """Read elements [start, stop) as bits (`NUMPY[dtype]`), one axis, into memory of the caller's own.

        Raises IntegrityError if a file that this takes is not the manifest's, MachineError if it cannot be read.
        """
        buffer = np.empty((stop - start) * tensor.item_bytes, np.uint8)
        try:
            # Not kept: it would form a cycle with us, and our files would stay open until that is collected.
            return Reader(opened=self._ready).read(tensor, start, stop, buffer).view(NUMPY[tensor.dtype])
        except OSError as error:
            raise self.unreadable(self._names[tensor.path], error) from None
        except DataError as error:  # cut while it was open
            raise IntegrityError(error.message, hint=FETCH_AGAIN) from None

    def map(self, path: Path) -> np.ndarray:
        """Map all bytes of a file; what is written to them stays in this process.

        If the disk fails, or somebody cuts the file, after it was digested, then touching a page that is no longer in
        memory ends the process with SIGBUS: a map has no way to raise an error. `read` does.
        """
        name, descriptor = self._names[path], self._ready(path)
        with self._lock:
            if name not in self._maps:
                self._maps[name] = np.frombuffer(
                    open_one_more(mmap.mmap, descriptor, 0, access=mmap.ACCESS_COPY), np.uint8
                )
            return self._maps[name]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a file from beginning to end, in chunks that are valid until the next one.

        Raises after the last byte if its SHA-256 is not the manifest's.
        """
        with self._opened(name) as descriptor:
            digest, position, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK_BYTES))
            while count := self._pread(name, descriptor, buffer, position):
                digest.update(buffer[:count])
                position += count
                yield buffer[:count]
            self._digests[self._seen[name]] = digest.hexdigest()
        self._compare(name)

    def check(self, names: Iterable[str]) -> None:
        """Digest the files that were not digested yet, several at a time, and see that none was replaced since.

        The latter alone if digests are not wanted.
        Raises IntegrityError that names all that differ, with both digests, MachineError if one cannot be read.
        """
        raise_all(self._folder, [problem for problem in self.problems(list(names)) if problem is not None])

    def ahead(self, names: Iterable[str]) -> None:
        """Digest files in the background, several at a time, and return at once. A read waits for its own file alone.

        Damage is raised where a file is read.
        """
        with self._lock:
            waiting = [name for name in names if self._verify != "off" and name not in self._ahead]
            self._ahead.update(waiting)

        def digest() -> None:
            while waiting:
                with contextlib.suppress(FlexmergeError, IndexError):  # another thread took the last
                    self._digest(waiting.pop(0), alone=True)  # a pool's threads would be waited for

        for _ in range(min(len(waiting), MAX_THREADS, os.cpu_count() or 1)):
            threading.Thread(target=digest, daemon=True).start()  # The program does not wait for it when it ends.

    @contextlib.contextmanager
    def checking(self, names: Iterable[str]) -> Iterator["BundleFiles"]:
        """Digest files while they are read: what is read inside of the block, through what it gives, does not wait.

        For one who hands nothing out before the block has ended. Raises as `check` when it ends, also in place of an
        error that reading damaged bytes has led to.
        """
        unchecked = copy.copy(self)
        unchecked._verify = "off"
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self.check, list(names))
            try:
                yield unchecked
            except FlexmergeError:
                done.result()
                raise
            done.result()

    def problems(self, names: list[str]) -> Iterator[FlexmergeError | None]:
        """Return what `check` finds, file by file in this order."""

        def problem(name: str) -> FlexmergeError | None:
            try:
                self._digest(name)
            except FlexmergeError as error:
                return error
            return None

        with ThreadPoolExecutor(max(1, min(len(names), MAX_THREADS, os.cpu_count() or 1))) as pool:
            try:
                yield from pool.map(problem, names)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def unreadable(self, name: str, error: OSError) -> MachineError:
        """Return the error for a file whose reading failed."""
        lacks = machine_failure(error)
        return MachineError(
            f"{self._folder / name} cannot be read: {lacks.message if lacks else error.strerror}; {self.readers(name)}",
            hint=lacks.hint if lacks else "check the disk, or fetch the bundle again",
        )

    def _digest(self, name: str, *, alone: bool = False) -> None:
        """Digest a file unless that was done, and compare. alone: in this thread, without others that help."""
        with self._lock:
            turn = self._turns.setdefault(name, threading.Lock())
        with turn:
            is_known = self._now(name) in self._digests
            if self._verify == "off":
                return
            if is_known:
                self._compare(name)
            elif not self._has_xxh3(name, alone=alone):
                for _ in self.chunks(name):
                    pass

    def _compare(self, name: str) -> None:
        if not self._is_sound(name):
            found, wanted = self._digests[self._seen[name]], self._entries[name].sha256
            raise DigestError(
                f"{self._folder / name}: sha256 differs: {found}, {wanted} by the manifest; {self.readers(name)}",
                hint=FETCH_AGAIN,
            )

    def _is_sound(self, name: str) -> bool:
        """Return whether the file was digested, and its digest is the manifest's."""
        entry, found = self._entries[name], self._digests.get(self._seen[name])
        return found is not None and found in (entry.sha256, entry.xxh3)

    def _has_xxh3(self, name: str, *, alone: bool) -> bool:
        """Compute the xxh3 of a file if that is wanted, and return whether it is the manifest's."""
        if self._verify != "xxh3" or self._entries[name].xxh3 is None:
            return False
        spans = range(0, self._entries[name].bytes, SPAN_BYTES)
        with self._opened(name) as descriptor:

            def pieces(start: int) -> bytes:
                buffer, found = memoryview(bytearray(PIECE_BYTES)), b""
                for position in range(start, start + SPAN_BYTES, PIECE_BYTES):
                    count = self._pread(name, descriptor, buffer, position)
                    found += xxhash.xxh3_128_digest(buffer[:count]) if count else b""
                return found

            if alone:
                found = xxhash.xxh3_128_hexdigest(b"".join(map(pieces, spans)))
            else:
                with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
                    found = xxhash.xxh3_128_hexdigest(b"".join(pool.map(pieces, spans)))
        if found == self._entries[name].xxh3:
            self._digests[self._seen[name]] = found
        return found == self._entries[name].xxh3

    def _now(self, name: str) -> Identity:
        """Raise IntegrityError unless the file is still the one that was looked at."""
        if name not in self._seen:
            self.look(name)
        held = self._held.get(name)
        try:
            status = os.fstat(held) if held is not None else (self._folder / name).stat()
            is_same = _identity(status) == self._seen[name]
        except (FileNotFoundError, NotADirectoryError):
            is_same = False
        except OSError as error:
            raise self.unreadable(name, error) from None
        if not is_same:
            raise self._replaced(name)
        return self._seen[name]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Give a descriptor for as long as the block lasts."""
        held = self._held.get(name)
        descriptor = held if held is not None else self._open(name)
        try:
            yield descriptor
        finally:
            if held is None:
                os.close(descriptor)

    def _open(self, name: str) -> int:
        self._now(name)
        flags = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = open_one_more(os.open, self._folder / name, flags)
        except OSError as error:
            raise self.unreadable(name, error) from None
        if _identity(os.fstat(descriptor)) != self._seen[name]:
            os.close(descriptor)
            raise self._replaced(name)
        return descriptor

    def _hold(self, name: str) -> int:
        with self._lock:
            if name not in self._held:
                self._held[name] = self._open(name)
            return self._held[name]

    def _ready(self, path: Path) -> int:
        """Return the descriptor of a file whose digest was compared, unless that is not wanted."""
        name = self._names[path]
        descriptor = self._held.get(name)
        if descriptor is None:
            descriptor = self._hold(name)
        if self._verify != "off" and not self._is_sound(name):
            self._digest(name)
        return descriptor

    def _pread(self, name: str, descriptor: int, buffer: memoryview, position: int) -> int:
        try:
            return os.preadv(descriptor, [buffer], position)
        except OSError as error:
            raise self.unreadable(name, error) from None

    def _replaced(self, name: str) -> IntegrityError:
        return IntegrityError(
            f"{self._folder / name} was replaced or changed since the bundle was opened; {self.readers(name)}",
            hint="open the bundle again",
        )

    def readers(self, name: str) -> str:
        return f"read by {', '.join(self._entries[name].tasks) or 'the ' + name.split('/')[0]}"


def raise_all(folder: Path, problems: list[FlexmergeError]) -> None:
    """Raise one error for all; an IntegrityError if one of them is."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        worst = next((problem for problem in problems if isinstance(problem, IntegrityError)), problems[0])
        lines = "\n  ".join(problem.message for problem in problems)
        raise type(worst)(f"{folder} is damaged:\n  {lines}", hint=worst.hint)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _close(held: dict[str, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)
