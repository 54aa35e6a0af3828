"""What foreign exceptions are told as: the machine's failures in their own words, and only the rest as defects."""

import errno
import os

import pytest

from flexmerge_cli.cli.failures import failure_of
from flexmerge_cli.errors import HINTS, DataError
from flexmerge_cli.report import inspect

from ..program import fails

CODES = [*HINTS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_an_error_of_the_system_is_exit_1_with_path_reason_and_hint(code, monkeypatch, tmp_path):
    def failing(*_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code), "/some/place")

    monkeypatch.setattr(inspect, "look", failing)
    shown = fails(1, "inspect", tmp_path)
    if code not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        assert shown.err.startswith(f"error: /some/place: {os.strerror(code)}\nhint: ")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), 1, "/a -> /b: Invalid cross-device"),
        (OSError(errno.EIO, "Input/output error"), 1, "reading or writing failed: Input/output error"),
        (OSError("no number"), 1, "reading or writing failed: no number"),
        (FileNotFoundError(2, "No such file or directory", b"/a\xff"), 1, "/a\\xff: No such file"),
        (TimeoutError(), 1, "reading or writing failed: TimeoutError"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("can't start new thread"), 1, "threads"),
        (ImportError("libtorch.so: cannot open shared object file"), 1, "libtorch.so"),
        (DataError("as it is"), 3, "as it is"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_told_of_an_exception(error, code, says):
    failure = failure_of(error)
    assert failure.exit_code == code and says in failure.message
    assert ("bug in flexmerge" in (failure.hint or "")) == isinstance(error, ZeroDivisionError)


def test_debug_shows_the_traceback_of_a_defect_and_the_error_too(monkeypatch, tmp_path, capsys):
    from flexmerge_cli.cli.app import run

    monkeypatch.setattr(inspect, "look", lambda *_a, **_k: 1 / 0)
    assert run(["inspect", str(tmp_path), "--debug", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err and "error: ZeroDivisionError" in err and '"exit_code": 1' in out


def test_without_a_home_a_tilde_is_a_name_like_another(monkeypatch, tmp_path):
    import pwd

    def nobody(_user: object) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    (tmp_path / "recipe.yaml").write_text("version: 1\nbase: x\ntasks: {a: y}\n")
    fails(4, "plan", tmp_path / "recipe.yaml", "--base", "~/base", "--dry-run", says="~/base")
    outputs = ["-o", tmp_path / "plan.json"]  # which are compared with the sources
    fails(4, "plan", "--base", "~/base", "--task", "a=~nobody/a", *outputs, says=("~/base", "~nobody/a"))
    for source in ("~/bundle", "~nobody/bundle"):
        fails(4, "inspect", source, says=source)
        fails(4, "export", source, "--all", "-o", tmp_path / "out", says=source)
    from flexmerge_cli.evaluation.cache import ScoreCache

    cache = ScoreCache()
    assert cache.get("0" * 32) is None
    cache._write(cache._path("0" * 32), b"")  # nothing is kept, and nothing fails
    assert cache.get("0" * 32) is None
