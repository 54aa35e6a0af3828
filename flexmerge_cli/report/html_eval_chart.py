"""Charts of a curve as markup: lines and bands are SVG, markers are text at their places, so they keep their form.

Every marker carries method, bytes and value as data attributes: what the page shows can be read out of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flexmerge_cli.report.curve_series import Axes, Series, axes_of, factor_ticks
from flexmerge_cli.report.html import text
from flexmerge_cli.report.html_chart import Tick, band, chart, line, nice_ticks
from flexmerge_cli.report.text import human_bytes

Values = Callable[[dict[str, Any]], tuple[float, float, float]]
"""(low, value, high) of a point."""


def mean_of(point: dict[str, Any]) -> tuple[float, float, float]:
    low, high = point["mean"]["interval"]
    return low, point["mean"]["value"], high


def of_task(task: str) -> Values:
    def values(point: dict[str, Any]) -> tuple[float, float, float]:
        low, high = point["tasks"][task]["interval"]
        return low, point["tasks"][task]["value"], high

    return values


def curve_chart(
    series: Sequence[Series], record: dict[str, Any], values: Values, *, fine_tuned: float | None, base: float | None,
    says: str, height: str, small: bool = False,
) -> str:  # fmt: skip
    """One picture. small: of many beside each other, without the copies and the second axis."""
    one = max(1, record["one_model_bytes"])
    others = [] if small else record["alternatives"]
    points = [point for one_line in series for point in one_line.points] + others
    lines = [value for value in (fine_tuned, base) if value is not None]
    axes = axes_of(points, [values(point) for point in points], lines)
    body, marks = [], []
    for place, one_line in sorted(enumerate(series), key=lambda item: not item[1].is_grey):
        lines_, markers = _series(place, one_line, values, axes, with_data=not small)
        body.append(lines_)
        marks += markers
    for value, kind in ((fine_tuned, "tuned"), (base, "base")):
        if value is not None:
            body.append(line([(0, axes.up(value)), (1, axes.up(value))], kind))
    for point in others:
        x, y = axes.across(point["bytes"]), axes.up(values(point)[1])
        name = point["method"].removeprefix("copies as ")
        marks.append(_mark("other", "○", point, values(point)[1], x, y, ""))
        marks.append(f'<b style="left:{100 * x:.2f}%;bottom:{100 * y:.2f}%">{text(name)}</b>')
    factors = factor_ticks(axes.low_bytes / one, axes.high_bytes / one)
    below = [
        Tick(
            place=axes.across(factor * one),
            label=f"{factor:.4g}x" + ("" if small else f"<br />{human_bytes(factor * one)}"),
            line=True,
        )
        for factor in factors
    ]
    named = [(fine_tuned, "fine-tuned"), (base, "base")]
    right = [Tick(place=axes.up(value), label=name) for value, name in named if value is not None]
    return chart(
        "".join(body),
        says=says,
        height=height,
        left=[
            Tick(place=axes.up(v), label=f"{v:g}", line=True)
            for v in nice_ticks(axes.low, axes.high, 4 if small else 7)
        ],
        right=[] if small else right,
        below=below,
        over="".join(marks),
        kind="small" if small else "curve",
    )


def _series(place: int, series: Series, values: Values, axes: Axes, *, with_data: bool) -> tuple[str, list[str]]:
    across = [axes.across(point["bytes"]) for point in series.points]
    ends = [[axes.up(value) for value in values(point)] for point in series.points]
    lower, middle, upper = ([(x, end[which]) for x, end in zip(across, ends)] for which in range(3))
    css = f"s s{place}"
    if len(series.points) > 1:
        area = band(lower, upper, f"area {css}")
    else:  # a band without a width is a stroke
        area = line([*lower, *upper], f"trace {css}")
    marks = [
        _mark(css, series.style.marker, point, values(point)[1], x, end[1], series.method if with_data else "")
        for point, x, end in zip(series.points, across, ends)
    ]
    return area + line(middle, f"trace {css}"), marks


def _mark(css: str, marker: str, point: dict[str, Any], value: float, x: float, y: float, method: str) -> str:
    told = f"{point['method']}: {value:.4f} in {human_bytes(point['bytes'])}"
    name = method or (point["method"] if css == "other" else "")
    data = f' data-method="{text(name)}" data-bytes={point["bytes"]} data-value={value!r}' if name else ""
    return f'<i class="{css}" style="left:{100 * x:.2f}%;bottom:{100 * y:.2f}%" title="{text(told)}"{data}>{marker}</i>'


def series_css(series: Sequence[Series]) -> str:
    """Colours and dashes of every method, and what is seen when one is picked."""
    rules = [".area { stroke: none !important; opacity: .1; }", ".s { transition: opacity .1s; }"]
    for place, one_line in enumerate(series):
        style, width = one_line.style, 1 if one_line.is_grey else 2
        rules += [
            f"svg .trace.s{place} {{ stroke: {style.colour}; stroke-width: {width}; "
            f"stroke-dasharray: {style.dash or 'none'}; }}",
            f"svg .area.s{place} {{ fill: {style.colour}; {'opacity: 0;' if one_line.is_grey else ''} }}",
            f"i.s{place}, .m{place} {{ color: {style.colour}; }}",
            f"main:has(#pick{place}:checked) .s:not(.s{place}) {{ opacity: .08; }}",
            f"main:has(#pick{place}:checked) svg .trace.s{place} {{ stroke-width: 3; stroke: {picked(one_line)}; }}",
            f"main:has(#pick{place}:checked) svg .area.s{place} {{ opacity: .25; fill: {picked(one_line)}; }}",
            f"main:has(#pick{place}:checked) i.s{place} {{ color: {picked(one_line)}; }}",
        ]
    return "\n".join(rules)


def picked(series: Series) -> str:
    """Grey lines are seen in blue where they are picked."""
    return "#0072b2" if series.is_grey else series.style.colour
