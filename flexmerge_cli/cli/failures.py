"""What a user is told of an exception: message, hint, exit code. Nothing is printed here."""

import errno
from concurrent.futures import BrokenExecutor

import typer

from flexmerge_cli.cli.signals import Interrupted
from flexmerge_cli.errors import FlexmergeError, MachineError, UsageError, machine_failure

HINTS = {
    errno.ENOSPC: "make room on the disk, or choose another place",
    errno.EDQUOT: "make room within your quota, or choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or take a file system that holds larger files",
    errno.EACCES: "check the permissions of the file and of the folders above it",
    errno.EPERM: "check the owner and the permissions of the file",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.EIO: "the disk or its connection fails: see the system's log, and copy the data elsewhere",
    errno.EAGAIN: "the system starts no more processes: wait, or raise the limit (ulimit -u)",
    errno.ENOENT: "the file or its folder is not there, or was removed meanwhile: check the path",
    errno.EEXIST: "the file appeared meanwhile: check the path",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "the path is a folder: give a file",
    errno.ELOOP: "symbolic links lead in a circle: check them with `readlink -f`",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ETIMEDOUT: "the file system or the network does not answer: try again",
    errno.ESTALE: "the file was replaced on its server: try again",
    errno.EBUSY: "another program uses it: try again",
    errno.ETXTBSY: "another program uses it: try again",
}


class Interruption(FlexmergeError):
    """Ctrl-C, or a signal that ends a run. Exit code: 128 and the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.exit_code = 128 + number


def failure_of(error: BaseException, command: str = "") -> FlexmergeError:
    """command: whose help is shown for arguments that cannot be parsed; empty: the program's."""
    if isinstance(error, FlexmergeError):
        return error
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Interruption(error.number if isinstance(error, Interrupted) else 2)
    if isinstance(error, SystemExit):
        return MachineError(
            f"a library or a method of your own ended the program: sys.exit({error.code!r})",
            hint="--debug shows where",
        )
    if (failure := machine_failure(error)) is not None:
        return failure
    if isinstance(error, OSError):
        names = " -> ".join(_text(name) for name in (error.filename, error.filename2) if name is not None)
        what = error.strerror or str(error) or type(error).__name__
        hint = HINTS.get(error.errno or 0, "check the path and the disk")
        return MachineError(f"{names or 'reading or writing failed'}: {what}", hint=hint)
    if isinstance(error, BrokenExecutor):
        return MachineError(
            "a worker process ended without a word: killed, most often for want of memory", hint="a lower --parallel"
        )
    if isinstance(error, ImportError):
        return MachineError(f"a library cannot be loaded: {error}", hint="install flexmerge and its libraries again")
    if hasattr(error, "format_message"):  # the parser's own: an unknown option, a missing value
        return UsageError(error.format_message(), hint=" ".join(filter(None, ["flexmerge", command, "--help"])))
    return FlexmergeError(
        f"{type(error).__name__}: {error}", hint="this is a defect of flexmerge: report it, with --debug's output"
    )


def _text(name: object) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)
