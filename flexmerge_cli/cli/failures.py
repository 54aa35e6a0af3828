"""Turns any exception into an error for the user: message, hint and exit code. Prints nothing."""

import typer

from flexmerge_cli.cli.signals import Interrupted
from flexmerge_cli.errors import FlexmergeError, MachineError, UsageError, hint_of, machine_failure


class Interruption(FlexmergeError):
    """Ctrl-C, or a signal that ends a run. Exit code: 128 plus the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.exit_code = 128 + number


def failure_of(error: BaseException, command: str = "") -> FlexmergeError:
    """Turn any exception into an error for the user.

    command: the command whose --help the hint for a parsing error names; empty: that of the program.
    """
    if isinstance(error, FlexmergeError):
        return error
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Interruption(error.number if isinstance(error, Interrupted) else 2)
    if isinstance(error, SystemExit):
        return MachineError(
            f"a library or one of your own methods ended the program: sys.exit({error.code!r})",
            hint="run with --debug to see where",
        )
    if (failure := machine_failure(error)) is not None:
        return failure
    if isinstance(error, OSError):
        names = " -> ".join(_text(name) for name in (error.filename, error.filename2) if name is not None)
        what = error.strerror or str(error) or type(error).__name__
        return MachineError(f"{names or 'reading or writing failed'}: {what}", hint=hint_of(error))
    if isinstance(error, ImportError):
        return MachineError(f"a library cannot be loaded: {error}", hint="reinstall flexmerge and its dependencies")
    if hasattr(error, "format_message"):  # a parser error, such as an unknown option or a missing value
        return UsageError(error.format_message(), hint=" ".join(filter(None, ["flexmerge", command, "--help"])))
    return FlexmergeError(
        f"{type(error).__name__}: {error}",
        hint="this is a bug in flexmerge: please report it with the output of --debug",
    )


def _text(name: object) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)
