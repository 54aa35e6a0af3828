"""Marks up charts of a curve: lines and bands are SVG, markers are text at their places, so they keep their form.

Every marker carries method, bytes and value as data attributes, so that programs can read the chart.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flexmerge_cli.report.curve_series import Axes, Series, axes_of, factor_ticks, mean_scale, mean_title
from flexmerge_cli.report.html import text
from flexmerge_cli.report.html_chart import Tick, band, chart, line, nice_ticks
from flexmerge_cli.report.score_text import scale_of
from flexmerge_cli.report.text import human_bytes

Values = Callable[[dict[str, Any]], tuple[float, float, float] | None]
"""Returns (low, value, high) of a point; None for values that are not numbers, which are not drawn."""


Drawn = tuple[dict[str, Any], tuple[float, float, float]]
"""A point and its (low, value, high)."""


def mean_of(point: dict[str, Any]) -> tuple[float, float, float] | None:
    return _triple(point["mean"])


def of_task(task: str) -> Values:
    return lambda point: _triple(point["tasks"][task])


def _triple(number: dict[str, Any]) -> tuple[float, float, float] | None:
    if number["value"] is None or number["interval"] is None:
        return None
    low, high = number["interval"]
    return low, number["value"], high


def curve_chart(
    series: Sequence[Series], record: dict[str, Any], values: Values, *, fine_tuned: float | None, base: float | None,
    says: str, height: str, metric: str | None = None,
) -> str:  # fmt: skip
    """Draw one chart of the means. metric: that of one task, whose chart is one of many: without copies and titles."""
    small, scale = metric is not None, mean_scale(record) if metric is None else scale_of(metric)
    one = max(1, record["one_model_bytes"])
    others = _drawn([] if small else record["alternatives"], values)
    drawn = {place: found for place, one in enumerate(series) if (found := _drawn(one.points, values))}
    points = [item for found in (*drawn.values(), others) for item in found]
    lines = [value for value in (fine_tuned, base) if value is not None]
    axes = axes_of([point for point, _ in points], [ends for _, ends in points], lines)
    body, marks = [], []
    for place in sorted(drawn, key=lambda place: not series[place].is_grey):
        lines_, markers = _series(place, series[place], drawn[place], axes, with_data=not small)
        body.append(lines_)
        marks += markers
    for value, kind in ((fine_tuned, "tuned"), (base, "base")):
        if value is not None:
            body.append(line([(0, axes.up(value)), (1, axes.up(value))], kind))
    for point, (_, value, _) in others:
        x, y = axes.across(point["bytes"]), axes.up(value)
        name = point["method"].removeprefix("copies as ")
        marks.append(_mark("other", "○", point, value, x, y, ""))
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
            Tick(place=axes.up(v), label=f"{scale * v:g}", line=True)
            for v in nice_ticks(axes.low, axes.high, 4 if small else 7)
        ],
        right=[] if small else right,
        below=below,
        over="".join(marks),
        kind="small" if small else "curve",
        up="" if small else mean_title(record),
        across="" if small else "tensor data stored, in models (x) and bytes",
    )


def _drawn(points: Sequence[dict[str, Any]], values: Values) -> list[Drawn]:
    return [(point, found) for point in points if (found := values(point)) is not None]


def _series(
    place: int, series: Series, drawn: Sequence[Drawn], axes: Axes, *, with_data: bool
) -> tuple[str, list[str]]:
    across = [axes.across(point["bytes"]) for point, _ in drawn]
    lower, middle, upper = ([(x, axes.up(ends[which])) for x, (_, ends) in zip(across, drawn)] for which in range(3))
    css = f"s s{place}"
    if len(drawn) > 1:
        area = band(lower, upper, f"area {css}")
    else:  # a band without a width is a stroke
        area = line([*lower, *upper], f"trace {css}")
    marks = [
        _mark(css, series.style.marker, point, value, x, y, series.method if with_data else "")
        for (point, (_, value, _)), (x, y) in zip(drawn, middle)
    ]
    return area + line(middle, f"trace {css}"), marks


def _mark(css: str, marker: str, point: dict[str, Any], value: float, x: float, y: float, method: str) -> str:
    title = f"{point['method']}: {value:.4g} in {human_bytes(point['bytes'])}"
    name = method or (point["method"] if css == "other" else "")
    data = f' data-method="{text(name)}" data-bytes={point["bytes"]} data-value={value!r}' if name else ""
    return (
        f'<i class="{css}" style="left:{100 * x:.2f}%;bottom:{100 * y:.2f}%" title="{text(title)}"{data}>{marker}</i>'
    )


def series_css(series: Sequence[Series]) -> str:
    """Return the colours and dashes of every method, and the rules that highlight one."""
    rules = [".area { stroke: none !important; opacity: .1; }", ".s { transition: opacity .1s; }"]
    for place, one_line in enumerate(series):
        style, width = one_line.style, 1 if one_line.is_grey else 2
        rules += [
            f"svg .trace.s{place} {{ stroke: {css_colour(style.colour)}; stroke-width: {width}; "
            f"stroke-dasharray: {style.dash or 'none'}; }}",
            f"svg .area.s{place} {{ fill: {css_colour(style.colour)}; {'opacity: 0;' if one_line.is_grey else ''} }}",
            f"i.s{place}, .m{place} {{ color: {css_colour(style.colour)}; }}",
            f"main:has(#pick{place}:checked) .s:not(.s{place}) {{ opacity: .08; }}",
            f"main:has(#pick{place}:checked) svg .trace.s{place} {{ stroke-width: 3; stroke: {picked(one_line)}; }}",
            f"main:has(#pick{place}:checked) svg .area.s{place} {{ opacity: .25; fill: {picked(one_line)}; }}",
            f"main:has(#pick{place}:checked) i.s{place} {{ color: {picked(one_line)}; }}",
        ]
    return "\n".join(rules)


def picked(series: Series) -> str:
    """Return the colour of a highlighted line; grey lines turn blue."""
    return "#0072b2" if series.is_grey else css_colour(series.style.colour)


def css_colour(colour: str) -> str:
    """Return the CSS of a colour. Black is the page's ink, which is white on a dark page."""
    return "var(--ink)" if colour == "#000000" else colour
