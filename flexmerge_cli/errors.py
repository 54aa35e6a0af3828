"""The errors a user sees: what is wrong, where, both sides, and what to do next.

The library raises them; only `cli/` prints them and exits. The class carries the exit code (README, "Exit codes").
"""

import errno
import re
from typing import Any

USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^/\s@]*@")
QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2}[^\s?#`'\"]*)[?#][^\s`'\"]*")


def without_secrets(text: str) -> str:
    """The same with every address in it cut down to scheme, host and path: no user, password or query."""
    return QUERY.sub(r"\1", USER.sub(r"\1", text)) if ":/" in text else text


class FlexmergeError(Exception):
    """Base of all errors that are meant for the user's eyes."""

    exit_code = 1
    document: "dict[str, Any] | None" = None
    """What a command printed with --json beside the error: all that it found out before it failed."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """message: what and where, without a trailing period. hint: what to do next, a command where there is one."""
        self.message = without_secrets(message)
        self.hint = None if hint is None else without_secrets(hint)
        super().__init__(self.message)


class MachineError(FlexmergeError):
    """The machine failed: disk, memory, permission."""

    exit_code = 1


class UsageError(FlexmergeError):
    """Asked wrongly: arguments, a recipe, a spec, an edited plan."""

    exit_code = 2


class DataError(FlexmergeError):
    """The inputs are unsound or do not fit together."""

    exit_code = 3


class SourceError(FlexmergeError):
    """A source cannot be had: missing, gated, offline."""

    exit_code = 4


class IntegrityError(FlexmergeError):
    """A bundle's bytes are not those its manifest tells of."""

    exit_code = 5


class GateError(FlexmergeError):
    """What was asked for cannot be reached, or a limit was not kept."""

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


def machine_failure(error: BaseException) -> MachineError | None:
    """What a foreign exception says of the machine: no memory, no thread or no open file left; None for any other.

    Python, numpy and torch raise MemoryError, RuntimeError or OSError for these, and only the text tells them from
    defects of ours.
    """
    said = str(error).lower()
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError) and any(words in said for words in _NO_THREAD):
        return MachineError(
            "the system starts no more threads", hint="use --threads 1, or raise the limit: ulimit -u, pids.max"
        )
    if code in (errno.EMFILE, errno.ENFILE):
        return MachineError("too many files are open", hint="raise the limit, e.g. ulimit -n 4096")
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    if (
        isinstance(error, MemoryError)
        or code == errno.ENOMEM
        or (foreign and any(words in said for words in _NO_MEMORY))
    ):
        return MachineError("out of memory", hint="set --max-memory to what is free, and use --threads 1")
    return None
