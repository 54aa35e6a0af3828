"""The standard streams while a command runs: no name out of a file is obeyed, no loss of output goes unnoticed.

What is printed is made visible first (`\\x1b` for an escape character), with replacements for what the encoding of the
stream cannot hold. Where stdout takes no more, OutputLost is raised; where stderr takes no more, messages are dropped.
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

UNENCODABLE = "flexmerge"  # name of the codecs' error handler
ASCII = {
    "…": "...", "–": "-", "·": "*", "×": "x", "≈": "~", "±": "+-", "√": "sqrt ", "Σ": "sum ", "²": "^2", "³": "^3",
    "‖": "|", "⟨": "<", "⟩": ">", "Δ": "delta", "τ": "tau", "θ": "theta", "λ": "lambda", "μ": "mu", "σ": "sigma",
    "─": "-", "│": "|", "┤": "|", "└": "+", "█": "#", "▇": "#", "▆": "#", "▅": "=", "▄": "=", "▃": "-", "▂": "-",
    "▁": "_", "━": "-", "╸": "-", "╺": "-", "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip


class OutputLost(MachineError):
    """stdout cannot be written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"standard output cannot be written: {error.strerror or error}", hint="send it where there is room"
        )
        self.unread = error.errno == errno.EPIPE
        """Whether a pipe's reader has gone, as of `| head`: it knows, and no message is due."""


class Stream:
    """A standard stream that makes visible what is written to it.

    rich, which has escape sequences of its own, writes to `rich_proxied_file`; report/console.py cares for the rest.
    """

    def __init__(self, file: TextIO, *, is_stdout: bool, escape: bool = True) -> None:
        self._file, self._is_stdout, self._escape = file, is_stdout, escape
        self.is_used = False
        if escape:
            self.rich_proxied_file = Stream(file, is_stdout=is_stdout, escape=False)

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
            with suppress(OSError, ValueError):  # no file of the system, in a test or a notebook
                # Python flushes what is left once more as it ends, and would exit with 120.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._file.fileno())
                os.close(nowhere)
            if self._is_stdout:
                raise OutputLost(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def shown_streams() -> Iterator[Stream]:
    """sys.stdout and sys.stderr as Streams; gives stdout's."""
    before = sys.stdout, sys.stderr
    files = [file if file is not None else io.StringIO() for file in before]  # None: closed, and nobody listens
    handlers = [_set_errors(file, UNENCODABLE) for file in files]
    stdout, stderr = (Stream(file, is_stdout=is_stdout) for file, is_stdout in zip(files, (True, False)))
    sys.stdout, sys.stderr = cast(TextIO, stdout), cast(TextIO, stderr)
    try:
        yield stdout
    finally:
        sys.stdout, sys.stderr = before
        for file, handler in zip(files, handlers):
            if handler is not None:
                _set_errors(file, handler)


def hold_closed_streams() -> None:
    """Give the numbers of closed standard streams to the null device, at the start of the process.

    The next file that is opened would get them, and be written into by what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number


def _set_errors(file: TextIO, handler: str) -> str | None:
    """The handler of before; None where there is none to set."""
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
