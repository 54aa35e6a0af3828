"""What the commands print on a terminal of 80 columns, held against golden/terminal.

`python -m tests.report.test_terminal_tables` writes the files anew.
"""

import contextlib
import fcntl
import io
import os
import re
import shutil
import struct
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.cli.terminal import shown_streams
from flexmerge_cli.report.curve import show_curve
from flexmerge_cli.report.diff import show_diff
from flexmerge_cli.report.evaluation import show_evaluation
from flexmerge_cli.report.table import table

from ..program import ROOT, Child
from . import records

GOLDEN = Path(__file__).parents[1] / "golden" / "terminal"
COLUMNS = 80
COMMANDS: dict[str, tuple[str, ...] | Callable[[], None]] = {
    "plan": ("plan", "--base", "base", "--tasks", "tasks", "-o", "plan.json"),
    "inspect_checkpoint": ("inspect", "tasks/digit"),
    "inspect_plan": ("inspect", "plan.json"),
    "inspect_block": ("inspect", "plan.json", "--block", "vit.encoder.layer.0.attention"),
    "merge_auto": ("merge", "plan.json", "--method", "auto", "--size", "1x", "-o", "bundle"),
    "merge_dry_run": ("merge", "plan.json", "--method", "emr", "--dry-run", "-o", "never"),
    "inspect_bundle": ("inspect", "bundle"),
    "inspect_verify": ("inspect", "bundle", "--verify"),
    "diff": lambda: show_diff(records.difference()),
    "eval": lambda: show_evaluation(records.scores(metrics=("accuracy", "perplexity"), name="a-task-with-a-long-name")),
    "curve": lambda: show_curve(records.record(3, name="low_bit:gain=norm,method")),
    "methods": ("methods",),
    "methods_low_bit": ("methods", "low_bit"),
}  # fmt: skip
VOLATILE = ((r"\x1b\[[0-9;]*m", ""), (r"\b[0-9a-f]{12,64}\b", "HEX"), (r"flexmerge \d+\.\d+\S*", "flexmerge VERSION"))


def family(folder: Path) -> None:
    """Three tasks of the digits."""
    digits = ROOT / "samples" / "digits"
    shutil.copytree(digits / "base", folder / "base")
    for task in ("digit", "parity", "rotation"):
        shutil.copytree(digits / "tasks" / task, folder / "tasks" / task)


def on_terminal(folder: Path, command: tuple[str, ...] | Callable[[], None]) -> str:
    """What a command, or the end of one, prints on stdout, which is a terminal. Fails unless it exits with 0."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, COLUMNS, 0, 0))

    def attach() -> None:
        os.dup2(its, 1)
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        torch.set_num_threads(1)  # those of the parent are not in the child
        if callable(command):
            with shown_streams():
                command()
            sys.stdout.flush()
            os._exit(0)

    child = Child(*(() if callable(command) else command), before=attach)
    os.close(its)
    printed = b""
    with contextlib.suppress(OSError):  # the child has closed its end
        while data := os.read(ours, 65536):
            printed += data
    os.close(ours)
    code, said = child.wait()
    assert code == 0, said
    return printed.decode().replace("\r\n", "\n")


def told(text: str) -> str:
    """Digits of bytes are 0: they are checked elsewhere, and any change of what a manifest says would change them."""
    text = re.sub(r"\d{1,3}(,\d{3})+", lambda number: re.sub(r"\d", "0", number[0]), text)
    for pattern, instead in VOLATILE:
        text = re.sub(pattern, instead, text)
    return text


def test_what_commands_print_fits_80_columns(tmp_path):
    """All in one test: each command needs what those before it wrote."""
    family(tmp_path)
    printed = {name: told(on_terminal(tmp_path, command)) for name, command in COMMANDS.items()}
    for name, text in printed.items():
        lines = text.splitlines()
        assert not [line for line in lines if line != line.rstrip()], name
        assert not [line for line in lines if len(line) > COLUMNS and "flexmerge merge" not in line], name
    golden = {name: (GOLDEN / f"{name}.txt").read_text() for name in COMMANDS}
    assert printed == golden, "python -m tests.report.test_terminal_tables writes them anew"


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=60)


@settings(deadline=None)  # the machine may be busy
@given(
    columns=st.integers(40, 200),
    rows=st.lists(st.tuples(names, st.integers(0, 10**9), names, st.integers(0, 10**15)), min_size=1, max_size=5),
)
def test_a_table_of_any_names_fits_the_line_and_keeps_numbers_whole(columns, rows):
    from rich.cells import cell_len

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("flexmerge_cli.report.table.line_columns", lambda: columns)
        table(["name", "count", "words", "bytes"], rows, text=(2,))
    lines = printed.getvalue().split("\n")
    assert max(map(cell_len, lines)) <= columns
    assert all(re.search(rf"(^|[^\d]){number}($|[^\d])", "\n".join(lines)) for row in rows for number in row[1::2])


def write_goldens() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        family(Path(place))
        for name, command in COMMANDS.items():
            (GOLDEN / f"{name}.txt").write_text(told(on_terminal(Path(place), command)))


if __name__ == "__main__":
    sys.exit(write_goldens())
