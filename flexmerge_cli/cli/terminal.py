"""Protects the standard streams while a command runs: control characters have no effect, and lost output is noticed.

Control characters are printed in visible form (`\\x1b` for an escape character), and characters that the stream's
encoding lacks are replaced. A failing stdout raises OutputLost; messages for a failing stderr are dropped.
"""

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from flexmerge_cli.errors import MachineError
from flexmerge_cli.report.text import visible

UNENCODABLE = "flexmerge"  # the name of the codecs' error handler
ASCII = {
    "…": "...", "–": "-", "·": "*", "×": "x", "≈": "~", "±": "+-", "√": "sqrt ", "Σ": "sum ", "²": "^2", "³": "^3",
    "‖": "|", "⟨": "<", "⟩": ">", "Δ": "delta", "τ": "tau", "θ": "theta", "λ": "lambda", "μ": "mu", "σ": "sigma",
    "─": "-", "│": "|", "┤": "|", "└": "+", "█": "#", "▇": "#", "▆": "#", "▅": "=", "▄": "=", "▃": "-", "▂": "-",
    "▁": "_", "━": "-", "╸": "-", "╺": "-", "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip


class OutputLost(MachineError):
    """The error for a stdout that cannot be written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"standard output cannot be written: {error.strerror or error}",
            hint="redirect it to a place with free space",
        )
        self.unread = error.errno == errno.EPIPE
        """Whether the reader of a pipe has gone, as after `| head`. It knows that, so no message is due."""


class TerminalStream:
    """A standard stream that writes control characters in visible form.

    rich, which writes escape sequences of its own, uses `rich_proxied_file`; report/console.py takes care of the rest.
    """

    def __init__(self, file: TextIO, *, is_stdout: bool, escape: bool = True) -> None:
        self._file, self._is_stdout, self._escape = file, is_stdout, escape
        self.is_used = False
        if escape:
            self.rich_proxied_file = TerminalStream(file, is_stdout=is_stdout, escape=False)

    def write(self, text: str) -> int:
        with self._failing():
            self._file.write(visible(text) if self._escape else text)
        self.is_used = True
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._file.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError):  # not a file of the operating system, as in a test or a notebook
                # Python flushes the stream again on exit, and would exit with 120.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._file.fileno())
                os.close(nowhere)
            if self._is_stdout:
                raise OutputLost(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def shown_streams() -> Iterator[TerminalStream]:
    """Replace sys.stdout and sys.stderr with Streams. Yields the one for stdout."""
    before = sys.stdout, sys.stderr
    files = [file if file is not None else io.StringIO() for file in before]  # None: the stream is closed
    handlers = [_set_errors(file, UNENCODABLE) for file in files]
    stdout, stderr = (TerminalStream(file, is_stdout=is_stdout) for file, is_stdout in zip(files, (True, False)))
    sys.stdout, sys.stderr = cast(TextIO, stdout), cast(TextIO, stderr)
    try:
        yield stdout
    finally:
        sys.stdout, sys.stderr = before
        for file, handler in zip(files, handlers):
            if handler is not None:
                _set_errors(file, handler)


def hold_closed_streams() -> None:
    """Open the null device in place of closed standard streams, at the start of the process.

    Otherwise the next file to be opened would get their numbers, and whatever a library prints would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number


def _set_errors(file: TextIO, handler: str) -> str | None:
    """Set the stream's error handler and return the previous one; None if it has none."""
    before, reconfigure = getattr(file, "errors", None), getattr(file, "reconfigure", None)
    if before is None or reconfigure is None:
        return None
    with suppress(OSError, ValueError):
        reconfigure(errors=handler)
    return str(before)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error(UNENCODABLE, _in_ascii)
