"""Formats scores: in percent, or in four digits."""

from flexmerge_cli.evaluation.curve_record import NORMALISED
from flexmerge_cli.evaluation.metrics import METRICS

DASH = "–"


def scale_of(metric: str) -> float:
    """Return 100 for metrics shown in percent and for parts of the fine-tuned score, else 1."""
    if metric == NORMALISED:
        return 100.0
    try:
        return 100.0 if METRICS[metric].percent else 1.0
    except KeyError:
        return 1.0


def format_score(value: float | None, scale: float) -> str:
    if value is None:
        return DASH
    return f"{scale * value:.1f}" if scale == 100.0 else f"{value:.4g}"


def interval_cells(ends: list[float] | None, scale: float) -> list[str]:
    if ends is None or ends[0] == ends[1]:
        return [DASH, DASH]
    low, high = ends
    return [format_score((high - low) / 2, scale), f"{format_score(low, scale)} … {format_score(high, scale)}"]
