"""Draws numbers on a terminal: a curve, a heat map, a shortened table. Legible without colour."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from flexmerge_cli.report.inspect_heat import LEVELS, Scale, ink
from flexmerge_cli.report.table import GAP, INDENT, line_columns, table
from flexmerge_cli.report.text import printable, tail

MANY_ROWS = 40  # a longer table is shortened to its two ends
CHART_COLUMNS, CHART_ROWS = 64, 9
SHORTEST_NAME = 20
WIDE = 100  # characters of a line that has room for all columns
NUMBERED_TASKS = 12  # with more, a heat map has no numbers


def curve(values: Sequence[float], labels: Sequence[str], *, below: tuple[str, str]) -> None:
    """Draw an area from 0 to the greatest value. labels: of top, middle and floor. below: of the ends of the x axis."""
    width = max(map(len, labels))
    room = max(1, min(CHART_COLUMNS, line_columns() - width - 2))
    columns = np.linspace(0, len(values) - 1, room).round().astype(int)
    eighths = np.array([values[column] for column in columns]) / (max(values) or 1.0) * CHART_ROWS * 8
    shown = dict(zip((CHART_ROWS - 1, CHART_ROWS // 2, 0), labels))
    for row in reversed(range(CHART_ROWS)):
        filled = np.clip(np.ceil(eighths - row * 8), 0, 8).astype(int)
        bars = "".join(" " if part == 0 else LEVELS[part - 1] for part in filled)
        print(f"{shown.get(row, ''):>{width}} {'┤' if row in shown else '│'}{bars.rstrip()}")
    print(f"{'':{width}} └{'─' * len(columns)}")
    left, right = below
    print(f"{'':{width}}  {left}{right:>{max(len(columns) - len(left), len(right) + 2)}}\n")


def heat_map(matrix: np.ndarray, names: Sequence[str], scale: Scale) -> None:
    """Draw [M, M] with a bar of eight heights per cell, its number if there is room, and colour if available."""
    from rich.text import Text

    from flexmerge_cli.report.console import Console

    console = Console(soft_wrap=True)
    width = min(24, max(map(len, names)))
    texts = [[scale.text(float(value)) for value in row] for row in matrix]
    cell, room = max(len(text) for row in texts for text in row) + 3, line_columns() - width - 5
    numbered = len(names) <= NUMBERED_TASKS and cell * len(names) <= room
    if not numbered:
        cell = 2 if 2 * len(names) <= room else 1
    heads = [printable(name)[: cell - 1] if numbered else "" for name in names]
    if numbered:
        print(" " * (width + 5) + "".join(f"{head:>{cell}}" for head in heads))
    for number, (name, row, of_row) in enumerate(zip(names, matrix, texts), 1):
        line = Text(f"{number:>3} {printable(name)[:width]:<{width}} ")
        for value, text in zip(row, of_row):
            bar = scale.level(float(value))
            line.append(f" {bar}{text:>{cell - 2}}" if numbered else bar * cell, style=_style(scale, float(value)))
        console.print(line)
    steps = np.linspace(scale.low, scale.high, len(LEVELS) + 1)
    print(
        "\n"
        + "  ".join(f"{level} {scale.text(step)}" for level, step in zip(LEVELS, steps))
        + f"  … {scale.text(scale.high)}\n"
    )


def long_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, every: bool, title: str = "", text: Collection[int] = ()
) -> None:
    """Print a table; only the two ends of a long one, unless all rows are requested.

    Names come first, and are shortened from the front if the line has no room for them.
    """
    if len(rows) > MANY_ROWS and not every:
        half = MANY_ROWS // 2
        gap = [f"… {len(rows) - 2 * half} more: -v shows all", *[""] * (len(columns) - 1)]
        rows = [*rows[:half], gap, *rows[-half:]]
    widths = [max(map(len, column.split("\n"))) for column in columns]
    for row in rows:
        widths = [max(width, len(str(cell))) for width, cell in zip(widths, row)]
    room = line_columns() - INDENT - sum(width + GAP for width in widths[1:])
    rows = [(tail(printable(str(first)), max(room, SHORTEST_NAME)), *rest) for first, *rest in rows]
    table(columns, rows, title=title, text=text)


def number(value: float | None) -> str:
    return "null" if value is None or np.isnan(value) else f"{value:.3f}"


def _style(scale: Scale, value: float) -> str:
    paper = scale.colour(value)
    return f"rgb({','.join(map(str, ink(paper)))}) on rgb({','.join(map(str, paper))})"
