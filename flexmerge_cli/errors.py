"""The errors a user sees: what is wrong, where, both sides, and what to do next.

The library raises them; only `cli/` prints them and exits. The class carries the exit code (README, "Exit codes").
"""


class FlexmergeError(Exception):
    """Base of all errors that are meant for the user's eyes."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """message: what and where, without a trailing period. hint: what to do next, a command where there is one."""
        super().__init__(message)
        self.message = message
        self.hint = hint


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
