"""The program as a user runs it: arguments in; exit code, stdout and stderr out. In this process where that will do."""

import contextlib
import io
import json
import os
import runpy
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmerge_cli.cli.app import run

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Result:
    """What one run left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which is one JSON document and nothing else."""
        return json.loads(self.out)


def flexmerge(*arguments: object) -> Result:
    """Run; an exception that no user should see fails the test whatever the exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    result = Result(code, out.getvalue(), err.getvalue())
    assert "this is a bug in flexmerge" not in result.err and "Traceback" not in result.err, result.err
    return result


def succeeds(*arguments: object) -> Result:
    result = flexmerge(*arguments)
    assert result.code == 0, result.err
    return result


def fails(code: int, *arguments: object, says: str | tuple[str, ...] = ()) -> Result:
    """Exit with `code` and an error that holds every word of `says`, and a hint."""
    result = flexmerge(*arguments)
    assert result.code == code, (result.code, result.err)
    assert result.err.splitlines()[0].startswith("error: ") or "\nerror: " in result.err, result.err
    assert "\nhint: " in result.err, result.err
    for word in (says,) if isinstance(says, str) else says:
        assert word in result.err, result.err
    return result


class Child:
    """The same in a process of its own, to be killed, limited or interrupted. Forked: torch is imported already."""

    def __init__(self, *arguments: object, before: Callable[[], None] = lambda: None) -> None:
        """before: run in the child, before the program."""
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.dup2(write, 1)
                os.dup2(write, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in background
                before()
                code = run([str(argument) for argument in arguments])
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)  # nothing of the test run's own goes on in the child
        os.close(write)

    def is_running(self) -> bool:
        """Whether it has not ended; `wait` has to follow."""
        return not select.select([self._read], [], [], 0)[0]

    def wait_for(self, path: Path) -> None:
        """Until something is there, or the program has said something, or has ended."""
        while not path.exists() and self.is_running():
            time.sleep(0.0005)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit code (of a signal: minus its number), and all that was printed."""
        with os.fdopen(self._read, "rb") as file:
            printed = file.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), printed


def run_script(patch: "pytest.MonkeyPatch", script: Path, *arguments: object) -> str:
    """Run a Python script as its own file runs, but in this process; return what it prints."""
    patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    patch.syspath_prepend(str(script.parent))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(script), run_name="__main__")
    return out.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored_sizes(folder: Path) -> dict[str, int]:
    """Every file below a folder that a size counts: relative path -> bytes.

    Not links, whose bytes are those of other files, and not the card of a bundle.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    files = [path for path in files if path != folder / "README.md"]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
