"""Writes all files in one way: beside their place, forced to disk, then renamed.

A place thus holds the old file or the whole new one, whatever happens. The file beside it is called
`.{name}.{16 hex digits}.partial`; its writer holds a lock on it, so that the next writer to the same place recognises
what a killed one left and removes it. bundle/publish.py publishes folders, with the helpers below.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexmerge_cli.errors import MachineError, UsageError, hint_of, machine_failure

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# Another file system, one without links, a file with the most links allowed, or one of another owner.
NO_LINK = (*NOT_SUPPORTED, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTTY)
# The errors of file systems that cannot force a folder to disk: CIFS, 9p, several of FUSE.
NO_FOLDER_SYNC = (*NOT_SUPPORTED, errno.EBADF, errno.EPERM, errno.EACCES, errno.EISDIR)


def write_file(path: Path, data: bytes | str) -> None:
    """Replace `path` by a file of these bytes (text is encoded as UTF-8), or leave it as it was.

    A link is replaced, not followed. Raises MachineError with the path and the reason.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as (partial, descriptor):
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            sync(descriptor)
            partial.replace(path)
    except OSError as error:
        raise cannot_write(error, path, len(data)) from None
    try:
        sync_folder(path.absolute().parent)
    except OSError as error:
        raise in_place(path, f"could not be forced to disk: {error.strerror}") from None


def check_file(path: Path, *, force: bool, replaceable: Callable[[Path], bool], what: str) -> None:
    """Check, before any work, that the place is free or with `force` holds `what`, and that a file can be made there.

    replaceable: returns whether a file is such a one; an empty file always is. Raises UsageError, MachineError.
    """
    parent = path.absolute().parent
    if os.path.lexists(path):
        if not force:
            raise UsageError(f"{path} exists", hint="choose another place, or replace it with --force")
        if not path.is_file() or not (path.stat().st_size == 0 or replaceable(path)):
            raise UsageError(f"{path} is not {what}, so --force does not replace it", hint="choose another place")
    check_parent(path)
    try:
        with _beside(path) if parent.is_dir() else contextlib.nullcontext():
            pass  # quotas, names that are too long, and systems whose permissions say nothing
    except OSError as error:
        raise cannot_write(error, path) from None


def check_parent(path: Path) -> None:
    """Check that an output can be made there; missing folders above it are made when it is written.

    Raises UsageError, MachineError.
    """
    parent = folder_above(path)
    if re.fullmatch("[a-z][a-z0-9+.-]+:", first := "".join(path.parts[:1])) and not os.path.lexists(first):
        hint = "write to this disk; `merge` and `push` send a bundle to an address"
        raise UsageError(f"{path} is an address, and nothing but a bundle is written to one", hint=hint)
    if path.name in ("", ".."):
        raise UsageError(f"{path} names no file or folder to make", hint="give the place a name")
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file, so nothing can be written in it", hint="choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{parent} is not writable", hint="choose another place")


def folder_above(path: Path) -> Path:
    """Return the nearest existing folder above an output; the ones between are made when it is written."""
    return next(folder for folder in path.absolute().parents if os.path.lexists(folder))


def has_start(path: Path, start: bytes) -> bool:
    """Return whether a file begins with these bytes, ignoring case."""
    try:
        with path.open("rb") as file:
            return file.read(len(start)).lower() == start.lower()
    except OSError:
        return False


def sync(descriptor: int) -> None:
    """Force a file to disk if its file system can do that. Raises OSError if the disk fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Force the entries of one folder to disk if its file system can do that. Raises OSError if the disk fails."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            error.filename = error.filename or str(folder)
            raise


def sync_tree(folder: Path) -> None:
    """Force a folder to disk with all files and folders in it. Raises OSError with the path if the disk fails."""
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(place, name)  # noqa: PTH118  a path for each of many files is slow
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                sync(descriptor)
            except OSError as error:
                error.filename = path
                raise
            finally:
                os.close(descriptor)
        sync_folder(Path(place))


def cannot_write(error: OSError, path: Path, needed_bytes: int = 0) -> MachineError:
    """Return the error for a write that failed. needed_bytes: those of the whole output, for a full disk."""
    if error.errno in NO_SPACE:
        return no_space(path, needed_bytes)
    lacks = machine_failure(error)
    if lacks is not None:
        return MachineError(f"{path} cannot be written: {lacks.message}", hint=lacks.hint)
    return MachineError(f"{path} cannot be written: {error.strerror or error}", hint=hint_of(error))


def no_space(path: Path, needed_bytes: int) -> MachineError:
    needed = f": {needed_bytes:,} bytes are needed" if needed_bytes else ""
    return MachineError(f"no space at {path}{needed}", hint="free some space, or write to another disk")


def in_place(path: Path, problem: str) -> MachineError:
    """Return the error for a failure after the new file or folder took its place."""
    return MachineError(f"the new {path} is complete and in its place, but {problem}", hint="check the disk")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back the signals that end a program until the block is done, so that a clean-up is never half done.

    Only Python's main thread handles signals; in other threads, and for a signal that Python does not handle, this does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: Any) -> None:
        held.append(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for ends in handlers:
        signal.signal(ends, hold)
    try:
        yield
    finally:
        for ends, handler in handlers.items():
            signal.signal(ends, handler)
        for number in dict.fromkeys(held):
            signal.raise_signal(number)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, int]]:
    """Make a new, empty file beside `path`, and give it and its descriptor; whatever has its name afterwards is
    removed."""
    path = path.absolute()
    _remove_stale(path)
    partial, descriptor = _made_beside(path)
    try:
        yield partial, descriptor
    finally:
        with undisturbed():
            with contextlib.suppress(OSError):
                os.close(descriptor)
            with contextlib.suppress(OSError):
                partial.unlink()


def _made_beside(path: Path) -> tuple[Path, int]:
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # without locks, what a killed writer left stays
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another writer may have taken it for a dead one's before it was locked.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), partial.lstat()):
                return partial, descriptor
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove what killed writers left beside `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):  # noqa: PTH208  names are all that is looked at
            if not pattern.fullmatch(name):
                continue
            stale = path.with_name(name)
            with contextlib.suppress(OSError):
                descriptor = os.open(stale, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    stale.unlink()
                finally:
                    os.close(descriptor)
