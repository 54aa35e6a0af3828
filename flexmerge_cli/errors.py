"""Defines the errors that users see: what is wrong, where, both sides, and what to do next.

The library raises them; only `cli/` prints them and exits. Each class carries its exit code.
"""

import errno
import re
from typing import Any

USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^/\s@]*@")
QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2}[^\s?#`'\"]*)[?#][^\s`'\"]*")


COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def without_secrets(text: str) -> str:
    """Return the text with every address reduced to scheme, host and path: without user, password and query."""
    return QUERY.sub(r"\1", USER.sub(r"\1", text)) if ":/" in text else text


def without_colours(text: str) -> str:
    """Return the text without the escape sequences by which libraries such as torch colour their messages."""
    return COLOURS.sub("", text)


_ADDRESSES: dict[str, str] = {}


def show_as(folder: object, address: str) -> None:
    """Make errors name the address, or another folder, where they would name this folder, which holds for this process
    what is there."""
    _ADDRESSES[str(folder)] = _with_addresses(address).rstrip("/")


def _with_addresses(text: str) -> str:
    for folder, address in list(_ADDRESSES.items()):  # other threads add to them
        text = text.replace(folder, address)
    return text


class FlexmergeError(Exception):
    """Base class of all errors that are meant for users."""

    exit_code = 1
    document: "dict[str, Any] | None" = None
    """What --json prints beside the error: the results found before the failure."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """message: what is wrong and where, without a final period. hint: what to do next, if possible a command."""
        message, hint = (self._said(message), None if hint is None else self._said(hint))
        self.message, self.hint = message, hint
        super().__init__(message)

    def _said(self, text: str) -> str:
        return without_colours(without_secrets(_with_addresses(text)))


class MachineError(FlexmergeError):
    """The machine failed: disk, memory, permission. Its folders are named even where others show an address."""

    exit_code = 1

    def _said(self, text: str) -> str:
        return without_colours(without_secrets(text))


class UsageError(FlexmergeError):
    """The request is wrong: arguments, a recipe, a spec or an edited plan."""

    exit_code = 2


class DataError(FlexmergeError):
    """The inputs are malformed or do not fit together."""

    exit_code = 3


class SourceError(FlexmergeError):
    """A source is not available: missing, gated, or offline."""

    exit_code = 4


class IntegrityError(FlexmergeError):
    """A bundle's bytes differ from what its manifest records."""

    exit_code = 5


class GateError(FlexmergeError):
    """The request cannot be met, or a limit was exceeded."""

    exit_code = 6


_NO_MEMORY = (
    "can't allocate memory",  # torch on the CPU
    "not enough memory",  # torch on Windows
    "out of memory",  # torch on CUDA
    "cannot allocate memory",  # strerror(ENOMEM), as Rust extensions quote it
    "bad_alloc",  # C++ extensions
    "bad allocation",
)
_NO_THREAD = ("can't start new thread", "can't allocate lock", "thread constructor failed")


HINTS = {
    errno.ENOSPC: "make room on the disk, or choose another place",
    errno.EDQUOT: "make room within your quota, or choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or use a file system that allows larger files",
    errno.EACCES: "check the permissions of the file and of the folders above it",
    errno.EPERM: "check the owner and the permissions of the file",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.EIO: "the disk or its connection is failing: check the system log, and copy the data elsewhere",
    errno.EAGAIN: "the system cannot start more processes: wait, or raise the limit (ulimit -u)",
    errno.ENOENT: "the file or its folder does not exist, or was removed meanwhile: check the path",
    errno.EEXIST: "the file appeared meanwhile: check the path",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "the path is a folder: give the path of a file",
    errno.ELOOP: "symbolic links form a loop: check them with `readlink -f`",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ETIMEDOUT: "the file system or the network does not answer: try again",
    errno.ESTALE: "the file was replaced on its server: try again",
    errno.EBUSY: "another program uses it: try again",
    errno.ETXTBSY: "another program uses it: try again",
    errno.ENOTCONN: "the file system is not connected any more: mount it again",
    errno.EHOSTDOWN: "the server of the file system does not answer: try again",
}


def hint_of(error: BaseException) -> str:
    """Return what to do about an error of the system, by its errno."""
    return HINTS.get(getattr(error, "errno", None) or 0, "check the path and the disk")


def machine_failure(error: BaseException) -> MachineError | None:
    """Recognise a foreign exception that means out of memory, threads or open files; None for any other.

    Python, numpy and torch raise MemoryError, RuntimeError or OSError for these, and only the text distinguishes them
    from bugs in flexmerge.
    """
    said = str(error).lower()
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError) and any(words in said for words in _NO_THREAD):
        return MachineError(
            "the system cannot start more threads", hint="use --threads 1, or raise the limit: ulimit -u, pids.max"
        )
    if code in (errno.EMFILE, errno.ENFILE):
        return MachineError("too many open files", hint="raise the limit, e.g. ulimit -n 4096")
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    if (
        isinstance(error, MemoryError)
        or code == errno.ENOMEM
        or (foreign and any(words in said for words in _NO_MEMORY))
    ):
        return MachineError("out of memory", hint="set --max-memory to the free memory, and use --threads 1")
    return None
