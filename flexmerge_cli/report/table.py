"""Prints tables and sentences on stdout, no wider than the line."""

import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells

from flexmerge_cli.report.text import printable

INDENT, GAP = 1, 2  # blanks before a table, and between its columns
LEAST_FOLDED = 12  # characters of a column that is folded
WITHOUT_TERMINAL = 100  # characters of a line


def line_columns() -> int:
    """Return the width of the terminal in characters; without a terminal that of COLUMNS, else 100."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or WITHOUT_TERMINAL
    except (OSError, ValueError, AttributeError):  # not a terminal, or no file at all
        columns = os.environ.get("COLUMNS", "")
        return int(columns) if columns.isdecimal() and int(columns) > 0 else WITHOUT_TERMINAL


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", text: Collection[int] = (), keys: int = 1
) -> None:
    """Print a table to stdout that fits the line. A head may contain line breaks.

    text: the columns of words besides the first, which is always one. They are aligned to the left and folded if the
    line is short; the others are aligned to the right and never folded: half a number is a wrong number. Columns that
    still do not fit go to a further table, which begins with the first `keys` columns again.
    """
    from rich.text import Text

    from flexmerge_cli.report.console import Console

    words, line = {0, *text}, line_columns()
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    heads = [[printable(part) for part in column.split("\n")] for column in columns]
    widest = [max(map(cell_len, [*head, *(row[place] for row in cells)])) for place, head in enumerate(heads)]
    console = Console(soft_wrap=True)
    if title:
        console.print(Text("\n".join(_folded(printable(title), line)), style="bold"))
    for widths in _layouts(widest, words, keys, line - INDENT):
        head = {place: [part for whole in heads[place] for part in _folded(whole, widths[place])] for place in widths}
        console.print(Text("\n".join(_lines(head, widths, words)), style="bold"))
        print(" " * INDENT + "─" * (sum(widths.values()) + GAP * (len(widths) - 1)))
        for row in cells:
            folded = {place: _folded(row[place], width) for place, width in widths.items()}
            print("\n".join(_lines(folded, widths, words)))
        print()


def say(text: str) -> None:
    """Print sentences, which a terminal shows without broken words; to a file or a pipe they go as one line."""
    lines = _folded(printable(text), line_columns()) if sys.stdout.isatty() else [printable(text)]
    print("\n".join(lines))


def _layouts(widest: Sequence[int], words: Collection[int], keys: int, room: int) -> list[dict[int, int]]:
    """Distribute the columns over tables that fit; each maps a column to its width."""
    least = [min(width, LEAST_FOLDED) if place in words else width for place, width in enumerate(widest)]
    parts = [list(range(keys))]
    for place in range(keys, len(widest)):
        if len(parts[-1]) > keys and sum(least[of] + GAP for of in (*parts[-1], place)) - GAP > room:
            parts.append(list(range(keys)))
        parts[-1].append(place)
    layouts = []
    for part in parts:
        folded = [place for place in part if place in words]
        left = room - GAP * (len(part) - 1) - sum(widest[place] for place in part if place not in words)
        widths = {place: widest[place] for place in part}
        while sum(widths[place] for place in folded) > left:
            longest = max(folded, key=lambda place: widths[place])
            if widths[longest] <= least[longest]:
                break
            widths[longest] -= 1
        layouts.append(widths)
    return layouts


def _folded(text: str, width: int) -> list[str]:
    """Break text into lines of at most `width` characters, at spaces, else after punctuation, else anywhere."""
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for word in re.findall(r" *[^ ]+", text):
        pieces = [word] if cell_len(word.lstrip()) <= width else re.findall(r" *[^ ./_,=:-]*[./_,=:-]*", word)
        for piece in pieces:
            if cell_len(lines[-1] + piece) <= width:
                lines[-1] += piece
                continue
            first, *more = chop_cells(piece.lstrip(), width) or [""]
            lines = [*(lines if lines != [""] else []), first, *more]
    return lines


def _lines(cells: Mapping[int, list[str]], widths: Mapping[int, int], words: Collection[int]) -> list[str]:
    """Return the lines of one row, whose cells are given as lines by column, side by side."""
    found = []
    for number in range(max(map(len, cells.values()))):
        line = " " * INDENT
        for place, parts in cells.items():
            part = parts[number] if number < len(parts) else ""
            blanks = " " * (widths[place] - cell_len(part))
            line += (part + blanks if place in words else blanks + part) + " " * GAP
        found.append(line.rstrip())
    return found
