"""Numbers and tables as text."""

from collections.abc import Mapping, Sequence
from typing import Any

PADDING = 3  # of a column
LEAST_FOLDED = 12  # characters of a column that is folded


def merges_words(allocation: Mapping[str, Any], before: str) -> str:
    """The number of merges of the order in an allocation, after `before`; empty if it has none, as for `auto`."""
    merges, undone = allocation["merges"], allocation["undone"]
    return f"{before}{merges} merges ({undone} undone)" if merges or undone else ""


def human_bytes(count: float) -> str:
    """Bytes for people, `1.3 GB`, in powers of ten like disks and the Hub."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def printable(text: str) -> str:
    """Text on one line, with control and direction marks and line breaks spelled out, as in `\\x1b`.

    Names come from strangers: a terminal must not obey an escape sequence in one.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def visible(text: str) -> str:
    """Like `printable`, but keeps line breaks and tabs."""
    return text if text.isprintable() else "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def tail(name: str, characters: int) -> str:
    """The end of a dotted name, if possible from a dot on: `…layers.3.mlp`."""
    if len(name) <= characters:
        return name
    end = name[-(characters - 1) :]
    dot = end.find(".")
    return "…" + (end[dot + 1 :] if 0 <= dot < len(end) // 2 else end)


def line_columns() -> int:
    """The width of the terminal in characters; 200 without a terminal."""
    from flexmerge_cli.report.console import Console

    console = Console()
    return console.width if console.is_terminal else 200


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", left: int = 1) -> None:
    """Print a table to stdout. Aligns the first `left` columns to the left, the rest to the right.

    Only the left ones are folded where the line is short: half a number is a wrong number. A head may have line breaks.
    """
    from rich import box
    from rich.table import Table

    from flexmerge_cli.report.console import Console

    heads = ["\n".join(map(printable, column.split("\n"))) for column in columns]
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    shown = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, title_style="bold")
    needed = 0
    for index, head in enumerate(heads):
        is_left = index < left
        shown.add_column(head, justify="left" if is_left else "right", overflow="fold", no_wrap=not is_left)
        widest = max(map(len, [*head.split("\n"), *(row[index] for row in cells)]))
        needed += PADDING + (min(widest, LEAST_FOLDED) if is_left else widest)
    for row in cells:
        shown.add_row(*row)
    console = Console()
    console.width = max(line_columns(), needed)
    console.print(shown)
