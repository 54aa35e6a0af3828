"""The program as a user runs it: arguments in; exit code, stdout and stderr out. In this process where that will do."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.cli.app import run

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
    assert "this is a defect of flexmerge" not in result.err and "Traceback" not in result.err, result.err
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


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The same in a process of its own, to be killed, limited or interrupted."""
    command = [sys.executable, "-m", "flexmerge_cli", *(str(argument) for argument in arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
