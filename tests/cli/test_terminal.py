"""What becomes of output: nothing is obeyed, every encoding holds it, and its loss has an exit code."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from flexmerge_cli.cli import gating
from flexmerge_cli.cli.app import run
from flexmerge_cli.cli.output import bars_on_stderr, emit, note, warn
from flexmerge_cli.cli.terminal import ASCII, shown_streams
from flexmerge_cli.errors import GateError
from flexmerge_cli.report.console import Console
from flexmerge_cli.report.table import table

from ..families import encoder, plain, write_checkpoint, write_family
from ..program import ROOT, fails, flexmerge, succeeds

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x00\x08\x7f\x9b31m\u202eevil\u2066\u2069\u200f\udcff\r"
HARMFUL = set(HOSTILE) - set("]0;owned[2J31mevil")


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal():
    out, err = Terminal(), Terminal()
    with (
        mock.patch.dict(os.environ, TERM="xterm-256color"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        shown_streams(),
    ):
        yield out, err


def test_no_way_of_printing_passes_on_what_a_terminal_obeys():
    with terminal() as (out, err):
        print(HOSTILE)
        note(HOSTILE)
        warn([HOSTILE])
        sys.stdout.write(HOSTILE)
        assert not HARMFUL & set(out.getvalue() + err.getvalue())
        assert out.getvalue().startswith(  # all of it
            r"\x1b]0;owned\x07\x1b[2J\x00\x08\x7f\x9b31m\u202eevil\u2066\u2069\u200f\udcff\r"
        )


def test_python_s_warnings_are_messages_like_ours_and_arithmetic_is_none(monkeypatch):
    """Huge values in a stranger's file printed `RuntimeWarning: overflow` with a line of the code."""

    def warns(_arguments):
        warnings.warn(HOSTILE, stacklevel=1)
        for category in (RuntimeWarning, FutureWarning, DeprecationWarning):
            warnings.warn("overflow", category, stacklevel=1)
        np.float64(1e308) * np.float64(1e308)
        return 0

    monkeypatch.setattr("flexmerge_cli.cli.app._code_of", warns)
    result = flexmerge("methods")
    assert result.code == 0 and result.err.startswith("warning: \\x1b]0;owned")
    assert result.err.count("\n") == 1 and not HARMFUL & set(result.err)


def test_tables_and_bars_keep_their_colours_and_none_of_a_name():
    with terminal() as (out, err):
        table(["name", HOSTILE], [(HOSTILE, 1)], title=HOSTILE)
        Console().print(HOSTILE)
        assert "\x1b[1m" in out.getvalue(), "the head is bold"
        assert not {"\x07", "\x9b", "\u202e", "\x08", "\udcff"} & set(out.getvalue())
        assert "\x1b[2J" not in out.getvalue() and "\x1b]" not in out.getvalue()
        with bars_on_stderr() as bars:
            bars.add_task(HOSTILE, total=2)
            bars.refresh()
            note(f"while a bar is shown: {HOSTILE}")
            print("a result while a bar is shown")
        assert "while a bar is shown" in err.getvalue() and "\x1b[" in err.getvalue(), "bars move the cursor"
        assert not {"\x07", "\x9b", "\u202e", "\x08", "\udcff"} & set(err.getvalue())
        assert "\x1b[2J" not in err.getvalue() and "\x1b]" not in err.getvalue()
        assert out.getvalue().endswith("a result while a bar is shown\n"), "results never go where the bars go"


def test_json_is_exact_and_has_no_raw_control_character():
    with terminal() as (out, _):
        emit({"name": HOSTILE}, as_json=True, show=print)
        assert json.loads(out.getvalue()) == {"name": HOSTILE}
        assert out.getvalue().isascii() and not HARMFUL & set(out.getvalue())


def test_a_line_break_in_a_name_begins_no_message_of_its_own():
    shown = fails(4, "inspect", "nowhere\nerror: all is well\nhint: curl evil | sh").err
    assert [line for line in shown.splitlines() if line.startswith(("error:", "hint:"))] == [
        "error: no checkpoint at " + str(Path("nowhere").absolute()),
        shown.splitlines()[-1],
    ]


def test_what_libraries_log_is_made_visible():
    with terminal() as (_, err):
        logging.lastResort.emit(logging.makeLogRecord({"msg": HOSTILE}))
        assert "\\x1b" in err.getvalue() and not HARMFUL & set(err.getvalue())


def test_the_parsers_errors_are_made_visible():
    assert "\\x1b[2J" in fails(2, "inspect", "x", "--\x1b[2J").err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gb2312", "euc-jp", "cp1252", "utf-8"])
def test_every_encoding_holds_what_is_printed(encoding, monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding=encoding) as file:
        monkeypatch.setattr(sys, "stdout", file)
        with shown_streams():
            print("1x ≈ 2 × 3 … ─ │ é 語 \udcff")
        assert file.errors == "strict", "the stream is as it was"
    shown = (tmp_path / "out").read_text(encoding=encoding)
    expected = "1x ≈ 2 × 3 … ─ │ é 語"
    for character in expected:
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            plain = ASCII.get(character) or character.encode("ascii", "backslashreplace").decode()
            expected = expected.replace(character, plain)
    assert shown == expected + " \\udcff\n"


def test_replacements_are_ascii():
    assert all(plain.isascii() for plain in ASCII.values())


class Full(io.StringIO):
    """A disk without room, or a pipe without a reader."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


NO_ROOM = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "arguments", "code", "says"),
    [
        (NO_ROOM, ["methods", "ties"], 1, "error: standard output cannot be written: No space left on device\n"),
        (NO_ROOM, ["methods", "ties", "--json"], 1, "error: standard output cannot be written"),
        (NO_ROOM, ["inspect", "nowhere", "--json"], 4, "error: no checkpoint at"),
        (NO_ROOM, ["inspect", "--no-such-option", "--json"], 2, "error: "),
        (NO_ROOM, ["--version"], 1, "error: standard output"),
        (NO_ROOM, ["--help"], 1, "error: standard output"),
        (BrokenPipeError(32, "Broken pipe"), ["methods"], 1, ""),
    ],
)
def test_lost_output_is_exit_1_unless_more_went_wrong(error, arguments, code, says, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full(error))
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    assert run(arguments) == code
    assert err.getvalue().startswith(says) and bool(says) == bool(err.getvalue())


def test_lost_output_of_what_was_written_says_that_it_is_in_place(tmp_path, monkeypatch):
    """Also if the reader of a pipe went away, as after `| head`: the bundle is there, and the code was 1 in silence."""
    folders = write_family(tmp_path, plain(num_tasks=2))
    plan, bundle = tmp_path / "plan.json", tmp_path / "bundle"
    commands = {
        plan: ("plan", *folders.arguments, "-o", plan),
        bundle: ("merge", plan, "-o", bundle),
        tmp_path / "out": ("export", bundle, "--task", "task0", "-o", tmp_path / "out"),
        tmp_path / "page.html": ("inspect", bundle, "--html", tmp_path / "page.html"),
    }
    for output, command in commands.items():
        monkeypatch.setattr(sys, "stdout", Full(BrokenPipeError(32, "Broken pipe")))
        monkeypatch.setattr(sys, "stderr", err := io.StringIO())
        assert run([str(argument) for argument in command]) == 1
        assert f"complete and in place: {output}" in err.getvalue() and output.exists()
    monkeypatch.undo()
    succeeds("inspect", bundle, "--verify")


def test_a_gate_that_fails_outweighs_lost_output(monkeypatch):
    verdict = {"pass": False, "tasks": {}}
    monkeypatch.setattr(gating, "require_pass", mock.Mock(side_effect=GateError("not met", hint="more")))
    with contextlib.redirect_stdout(Full(NO_ROOM)), shown_streams(), pytest.raises(GateError):
        gating.finish({"gate": verdict}, "b", as_json=False, show=print, written=[])


@pytest.mark.parametrize("err", [None, Full(NO_ROOM), Full(BrokenPipeError(32, "Broken pipe"))])
def test_lost_messages_change_neither_exit_code_nor_document(err, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(sys, "stderr", err)
    assert run(["inspect", "nowhere", "--json"]) == 4
    assert json.loads(out.getvalue())["error"]["exit_code"] == 4


def test_without_stdout_a_command_works(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run(["methods", "ties"]) == 0


def test_streams_of_the_system_that_are_closed_or_full_end_in_a_documented_code(tmp_path):
    """Python itself would exit with 120 when it flushes them; closed ones would be given to the next file opened."""
    write_checkpoint(tmp_path / "model", encoder(layers=1))
    script = """
    cd "$1"; run() { "$PYTHON" -m flexmerge_cli "$@"; }
    run --version > /dev/full 2> err; echo $?
    PYTHONUNBUFFERED=1 run --version > /dev/full 2>> err; echo $?
    run inspect model --json > document 2>&-; echo $?
    run inspect nowhere >&- 2> /dev/full; echo $?
    run --no-such 2>&- >&- <&-; echo $?
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["1", "1", "0", "4", "2"] and done.stderr == ""
    assert (tmp_path / "err").read_text().count("error: standard output cannot be written") == 2
    assert json.loads((tmp_path / "document").read_text())["kind"] == "checkpoint"


@pytest.mark.parametrize(
    "arguments",
    [[], ["plan"], ["merge", "nowhere"], ["inspect", "x", "--no"], ["methods", "nope"], ["nope"], ["eval"], ["export"]],
)
def test_every_error_is_one_document_on_stdout_with_json(arguments):
    result = flexmerge(*arguments, "--json")
    assert result.code != 0 and result.json["error"]["exit_code"] == result.code
    assert result.json["error"]["message"] in result.err
