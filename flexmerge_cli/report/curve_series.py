"""Computes the contents of a picture of a curve: a line per method, the references, the alternatives, and the axes.

The colours are Okabe and Ito's (2008), which colour-blind readers can distinguish; each has a marker and a dash, so
that they differ in grey, too. If there are more methods than styles, those that are best at some size have one, and
the others are grey.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexmerge_cli.evaluation.curve_record import NORMALISED
from flexmerge_cli.evaluation.evaluate import one_metric
from flexmerge_cli.report.score_text import scale_of


@dataclass(frozen=True, slots=True)
class Style:
    """The style of one method's line."""

    colour: str
    marker: str
    """The marker, a single character."""
    dash: str
    """The dashes in SVG notation; empty for a solid line."""
    png_marker: str
    """The dashes and marker in matplotlib's notation."""


STYLES = (
    Style("#0072b2", "●", "", "o"),
    Style("#d55e00", "■", "7 3", "s"),
    Style("#009e73", "▲", "2 3", "^"),
    Style("#cc79a7", "◆", "9 3 2 3", "D"),
    Style("#8c6d00", "▼", "", "v"),
    Style("#56b4e9", "✚", "7 3", "P"),
    Style("#000000", "✖", "2 3", "X"),
    Style("#9a4fd0", "★", "9 3 2 3", "*"),
)
GREY = Style("#9c9c9c", "·", "", ".")
MARGIN = 0.06  # of the vertical axis, above and below


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The points of one method, from the fewest bytes to the most."""

    method: str
    points: tuple[dict[str, Any], ...]
    style: Style

    @property
    def is_grey(self) -> bool:
        return self.style is GREY


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The ends of both axes. Bytes are drawn on a logarithmic scale, since each doubling is a decision of its own."""

    low_bytes: float
    high_bytes: float
    low: float
    high: float

    def across(self, count: float) -> float:
        """Return the position of a number of bytes, in [0, 1]."""
        return math.log(max(1.0, count) / self.low_bytes) / math.log(self.high_bytes / self.low_bytes)

    def up(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def series_of(record: dict[str, Any]) -> list[Series]:
    """Return the series in the order of the methods. The caller draws grey ones first."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for point in record["points"]:
        by_method.setdefault(point["method"], []).append(point)
    chosen = list(by_method)
    if len(chosen) > len(STYLES):
        ranked = sorted(by_method, key=lambda method: _merit(method, record))
        chosen = [method for method in by_method if method in ranked[: len(STYLES)]]
    styles = dict(zip(chosen, STYLES))
    return [
        Series(
            method=method,
            points=tuple(sorted(points, key=lambda point: point["bytes"])),
            style=styles.get(method, GREY),
        )
        for method, points in by_method.items()
    ]


def axes_of(
    points: Sequence[dict[str, Any]], values: Sequence[tuple[float, float, float]], lines: Sequence[float]
) -> Axes:
    """Compute the axes. values: (low, value, high) of each point. lines: those of the references."""
    sizes = [max(1.0, float(point["bytes"])) for point in points] or [1.0]
    ends = [end for low, _, high in values for end in (low, high) if math.isfinite(end)] + [
        line for line in lines if math.isfinite(line)
    ]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = (high - low) * MARGIN or abs(high) * MARGIN or 1.0
    return Axes(low_bytes=min(sizes) / 1.12, high_bytes=max(sizes) * 1.12, low=low - room, high=high + room)


def sizes_of(record: dict[str, Any]) -> list[str]:
    """Return the requested sizes, from the smallest point to the largest."""
    found: dict[str, float] = {}
    for point in record["points"]:
        for size in point["sizes"]:
            found[size] = max(found.get(size, 0.0), float(point["bytes"]))
    return sorted(found, key=lambda size: found[size])


def ranking(record: dict[str, Any], size: str) -> dict[str, int]:
    """Map each method that reaches a size to its rank there; 1 is the best.

    Methods share a rank if their intervals overlap with that of the best of them: a difference within them means
    nothing.
    """
    better = _signs(record)
    ranks: dict[str, int] = {}
    low, rank = math.inf, 0
    for place, point in enumerate(_by_mean(record, size), 1):
        ends = sorted(better * end for end in point["mean"]["interval"])
        if ends[1] < low:  # it ends below the interval of the best of the rank before
            low, rank = ends[0], place
        ranks[point["method"]] = rank
    return ranks


def _by_mean(record: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """Return the points at a size, from the best mean to the worst."""
    reached = [point for point in record["points"] if size in point["sizes"] and point["mean"]["value"] is not None]
    return sorted(reached, key=lambda point: -_signs(record) * point["mean"]["value"])


def factor_ticks(low: float, high: float) -> list[float]:
    """Return powers of two of one model within two factors; if there are none, one number between them."""
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    return [2.0**power for power in range(first, last + 1)] or [math.sqrt(low * high)]


def _merit(method: str, record: dict[str, Any]) -> tuple[float, float, str]:
    """Return a sort key: small for methods that are best at some size, then by the best part of the fine-tuned
    score."""
    at_sizes = [[point["method"] for point in _by_mean(record, size)] for size in sizes_of(record)]
    known = [1 + methods.index(method) for methods in at_sizes if method in methods]
    best = max((_part(point) for point in record["points"] if point["method"] == method), default=0.0)
    small = min((point["bytes"] for point in record["points"] if point["method"] == method), default=0)
    return (min(known, default=99) + sum(known) / max(1, len(known)) / 100, -best, f"{small:020d}{method}")


def _part(point: dict[str, Any]) -> float:
    part = point["mean"]["normalised"]
    return float((point["mean"]["value"] or 0.0) if part is None else part)


def _signs(record: dict[str, Any]) -> float:
    """Return -1 if the metric falls. With different metrics, means are of parts of the fine-tuned scores, which
    rise."""
    falls = not any(task["higher_is_better"] for task in record["tasks"].values())
    return -1.0 if falls and one_metric(record["tasks"]) is not None else 1.0


def metric_label(record: dict[str, Any]) -> str:
    """Return the name of the metric of the means."""
    return one_metric(record["tasks"]) or "part of the fine-tuned score"


def mean_scale(record: dict[str, Any]) -> float:
    """Return 100 if the means are shown in percent, else 1."""
    return scale_of(one_metric(record["tasks"]) or NORMALISED)


def mean_title(record: dict[str, Any]) -> str:
    """Return what the vertical axis of the means shows."""
    percent = ", %" if mean_scale(record) == 100 else ""
    return f"{metric_label(record)}, mean over {len(record['tasks'])} tasks{percent}"
