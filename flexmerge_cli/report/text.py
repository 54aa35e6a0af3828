"""Numbers and tables as text."""

from collections.abc import Sequence
from typing import Any


def human_bytes(count: float) -> str:
    """`1.3 GB`; powers of ten, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def printable(text: str) -> str:
    """Names come from strangers: a terminal must not obey an escape sequence in one."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", left: int = 1) -> None:
    """Print a table to stdout; the first `left` columns to the left, the rest to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(printable(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(printable(str(cell)) for cell in row))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    console.print(shown)
