"""Opens files that come from outside: only regular files, and never more bytes than their kind can have.

Opening a FIFO waits for a writer that never comes, and a device such as /dev/zero has no end. Both are refused at once.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from flexmerge_cli.errors import DataError, MachineError, SourceError, hint_of, machine_failure

KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, without ever waiting.

    Raises SourceError if it is missing, DataError if it is anything but a file, and MachineError if it cannot be read.
    """
    try:
        return os.fdopen(open_descriptor(path), "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"no file at {path}", hint="check the path") from None
    except (OSError, ValueError) as error:
        check_kind(path)
        reason = getattr(error, "strerror", None) or error
        failed = MachineError(f"{path} cannot be opened: {reason}", hint=hint_of(error))
        raise machine_failure(error) or failed from None


def open_descriptor(path: Path) -> int:
    """Like `open_file`, but returns a descriptor. Raises OSError, and DataError for anything but a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise _no_file(path, kind)
    return descriptor


def check_kind(path: Path) -> None:
    """Raise DataError if there is something at the path that is neither a file nor a folder."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):
        return
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise _no_file(path, kind)


def read_file(path: Path, max_bytes: int, what: str) -> bytes:
    """Read all bytes of a regular file. Raises like `open_file`, and DataError if it has more than max_bytes.

    what: the kind of file that is expected, with its article, e.g. `a plan`.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= max_bytes else b""  # read(n) takes n bytes of memory at once
        if len(data) > size:  # It grows, or its size is not known.
            data += file.read(max_bytes + 1 - len(data))
        if max(size, len(data)) > max_bytes:
            raise DataError(
                f"{path} has {size:,} bytes, and {what} has at most {max_bytes:,}",
                hint="check that it is the right file",
            )
    return data


def _no_file(path: Path, kind: int) -> DataError:
    return DataError(f"{path} is {KINDS.get(kind, 'something else')}, not a file", hint="give a file or a folder")
