"""Prints what the commands say: results on stdout; messages, errors and progress on stderr."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from flexmerge_cli.errors import FlexmergeError

SECONDS_BETWEEN_LINES = 30.0  # of progress, without a terminal


def emit(
    value: Any, *, as_json: bool, show: Callable[[Any], None], quiet: bool = False, written: Sequence[Path | str] = ()
) -> None:
    """Print the result, after everything else: as ASCII JSON, which every encoding can hold, or with `show`.

    quiet: print it only as JSON. written: the outputs that took their places before, which an error about lost output
    names.
    """
    from flexmerge_cli.cli.terminal import OutputLost

    try:
        if as_json:
            print(json.dumps(value, indent=2))
        elif not quiet:
            show(value)
        sys.stdout.flush()
    except OutputLost as lost:
        lost.hint = "the command itself succeeded; only its output is lost"
        if written:
            lost.message += f"; complete and in place: {', '.join(map(str, written))}"
            lost.unread = False  # whoever closed the pipe does not know that
        raise


def warn(messages: Iterable[str], *, quiet: bool = False) -> None:
    for message in () if quiet else messages:
        note(f"warning: {message}")


def note(message: str, *, quiet: bool = False) -> None:
    """Print a message on stderr. Further lines are indented, so that a line break in a name starts no new message."""
    from flexmerge_cli.report.text import visible

    # Here too, not only in the stream: rich interprets markup before it writes.
    first, *rest = visible(message).split("\n")
    if not quiet:
        print(first, *(line if not line or line[0] == " " else f"  {line}" for line in rest), sep="\n", file=sys.stderr)


def tell(error: "FlexmergeError") -> None:
    """Print an error on stderr."""
    note(f"error: {error.message}")
    if error.hint:
        note(f"hint: {error.hint}")


@contextmanager
def progress(
    *, quiet: bool, verbose: bool = False, counts: bool = False, stages: int = 0
) -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar on stderr, for one stage after the other. Yields (stage, done, in all) -> None.

    Without a terminal it prints a line every 30 s instead, and one at the start of each stage if their number is known.
    With verbose, it prints the seconds of each stage at the end. counts: progress counts items, not bytes. stages:
    their number; 0 if unknown.
    """
    started: dict[str, float] = {}
    last = time.monotonic()

    def label(stage: str) -> str:
        return f"{stage} ({list(started).index(stage) + 1} of {stages})" if stages else stage

    def line(stage: str, done: int, total: int) -> None:
        nonlocal last
        is_new = stage not in started
        started.setdefault(stage, time.perf_counter())
        if (is_new and stages) or time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            note(label(stage) + ("" if is_new else f": {done / max(1, total):.0%}"), quiet=quiet)

    if quiet or not sys.stderr.isatty():
        yield line
    else:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[ProgressColumn] = [MofNCompleteColumn()] if counts else [DownloadColumn(), TransferSpeedColumn()]
        with bars_on_stderr(BarColumn(), *columns, TimeRemainingColumn()) as bars:
            bar = bars.add_task("", visible=False)

            def update(stage: str, done: int, total: int) -> None:
                if stage not in started:
                    started[stage] = time.perf_counter()
                    bars.reset(bar, visible=True)
                bars.update(bar, description=label(stage), completed=done, total=total)

            yield update
    if verbose and started:
        ends = [*list(started.values())[1:], time.perf_counter()]
        for (stage, start), end in zip(started.items(), ends):
            note(f"{end - start:8.2f} s  {stage}", quiet=quiet)


def bars_on_stderr(*columns: "ProgressColumn") -> "Progress":
    """Return progress bars on stderr with these columns after the description. Finished bars disappear."""
    from rich.progress import Progress, TextColumn

    from flexmerge_cli.report.console import Console

    described = TextColumn("{task.description}", markup=False)
    # Results must go to stdout even while bars are shown; rich would redirect them to stderr.
    return Progress(described, *columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
