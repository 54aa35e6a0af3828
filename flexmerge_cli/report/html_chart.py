"""Marks up curves, points and trees: lines are SVG that stretches with the page, text is HTML that does not.

So a chart is as legible at 390 px as at 1280, and in print. Places are fractions of the plot, from its left and bottom.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexmerge_cli.report.html import text

UNITS = 1000  # of the SVG's own coordinates, along either side

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A label on an axis."""

    place: float
    label: str
    """The text as markup."""
    line: bool = False
    """Whether a line crosses the plot."""


def chart(
    body: str, *, says: str, height: str, left: Sequence[Tick] = (), right: Sequence[Tick] = (),
    below: Sequence[Tick] = (), above: Sequence[Tick] = (), over: str = "", kind: str = "", up: str = "",
    across: str = "",
) -> str:  # fmt: skip
    """Make a figure of `body`, SVG paths, with ticks around it.

    says: the chart in words, for those who cannot see it. height: CSS. over: markup on top. kind: class that sets
    margins.
    up, across: titles of the axes.
    """
    lines = "".join(f'<path class=grid d="M0 {_y(tick.place)}H{UNITS}"/>' for tick in left if tick.line)
    lines += "".join(f'<path class=grid d="M{_x(tick.place)} 0V{UNITS}"/>' for tick in (*below, *above) if tick.line)
    labels = [
        f'<span class={side} style="{edge}:{100 * tick.place:.2f}%">{tick.label}</span>'
        for side, edge, ticks in (
            ("left", "bottom", left), ("right", "bottom", right), ("below", "left", below), ("above", "left", above),
        )
        for tick in ticks
    ]  # fmt: skip
    title = f"<p class='axis up'>↑ {text(up)}</p>" if up else ""
    return (
        f'{title}<figure class="chart {kind}" role=img aria-label="{text(says)}">'
        f'<div class=plot style="height:{height}">'
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{lines}{body}</svg>{"".join(labels)}{over}'
        "</div></figure>" + (f"<p class=axis>{text(across)}</p>" if across else "")
    )


def line(points: Sequence[Point], style: str) -> str:
    """Draw a line. style: a class of the style sheet."""
    return f'<path class="{style}" d="{_path(points)}"/>'


def band(lower: Sequence[Point], upper: Sequence[Point], style: str) -> str:
    """Fill the area between two lines."""
    return f'<path class="{style}" d="{_path([*lower, *reversed(upper)])}Z"/>'


def dots(points: Sequence[Point], colour: str, width: float) -> str:
    """Draw points that are round whatever the plot's proportions: strokes without length. width: pixels."""
    moves = "".join(f"M{_x(x)} {_y(y)}h0" for x, y in points)
    return f'<path class=dots stroke="{colour}" stroke-width="{width:g}" d="{moves}"/>'


def brackets(joins: Sequence[tuple[Point, Point, float]]) -> str:
    """Draw a tree that grows to the right: for each join its two ends, and how far right they meet."""
    moves = "".join(f"M{_x(a[0])} {_y(a[1])}H{_x(meet)}V{_y(b[1])}H{_x(b[0])}" for a, b, meet in joins)
    return f'<path class=tree d="{moves}"/>'


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round numbers in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def fraction(value: float, low: float, high: float) -> float:
    """Return the position of a value between two ends, as a fraction; 0 if the ends are equal."""
    return (value - low) / (high - low) if high != low else 0.0


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{_x(x)} {_y(y)}" for x, y in points)


def _x(place: float) -> str:
    return f"{UNITS * place:.1f}".removesuffix(".0")


def _y(place: float) -> str:
    return f"{UNITS * (1 - place):.1f}".removesuffix(".0")
