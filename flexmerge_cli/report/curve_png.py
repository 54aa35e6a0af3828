"""Draws the curve as a picture, with matplotlib."""

import io
from pathlib import Path
from typing import Any

from flexmerge_cli.errors import UsageError
from flexmerge_cli.report.curve_series import axes_of, factor_ticks, mean_scale, mean_title, series_of
from flexmerge_cli.report.text import human_bytes, printable
from flexmerge_cli.writing import has_start, write_file

DASHES = {"": "-", "7 3": "--", "2 3": ":", "9 3 2 3": "-."}


def require_matplotlib() -> None:
    """Raise UsageError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("matplotlib is not installed", hint="pip install 'flexmerge-cli[eval]'") from None


def is_png(path: Path) -> bool:
    """Return whether a file is a picture written by --png, which --force may replace."""
    return has_start(path, b"\x89PNG\r\n\x1a\n")


def write_png(record: dict[str, Any], path: Path) -> None:
    """Draw the picture, 1800 pixels wide. Raises UsageError without matplotlib, MachineError if it cannot be
    written."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    one = max(1, record["one_model_bytes"])
    alternatives = [point for point in record["alternatives"] if point["mean"]["value"] is not None]
    everything = [*(point for point in record["points"] if point["mean"]["value"] is not None), *alternatives]
    means = [(*point["mean"]["interval"], point["mean"]["value"]) for point in everything]
    lines = [value for value in (record["mean"]["fine_tuned"], record["mean"]["base"]) if value is not None]
    axes = axes_of(everything, [(low, value, high) for low, high, value in means], lines)
    figure = Figure(figsize=(9, 5.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    for one_line in sorted(series_of(record), key=lambda series: not series.is_grey):
        drawn = [point for point in one_line.points if point["mean"]["value"] is not None]
        across = [point["bytes"] for point in drawn]
        values = [point["mean"]["value"] for point in drawn]
        style, grey = one_line.style, one_line.is_grey
        plot.plot(
            across, values, color=style.colour, marker=style.png_marker, markersize=3 if grey else 5.5,
            linestyle=DASHES[style.dash], linewidth=0.8 if grey else 1.6, zorder=1 if grey else 3,
            label=None if grey else printable(one_line.method),
        )  # fmt: skip
        if not grey:
            ends = [point["mean"]["interval"] for point in drawn]
            plot.fill_between(
                across, [low for low, _ in ends], [high for _, high in ends], color=style.colour, alpha=0.1, linewidth=0
            )
    greys = [series for series in series_of(record) if series.is_grey]
    if greys:
        plot.plot([], [], color=greys[0].style.colour, linewidth=0.8, label=f"{len(greys)} other methods")
    for value, label, dash in (
        (record["mean"]["fine_tuned"], "fine-tuned", "-"),
        (record["mean"]["base"], "base", (0, (1, 2))),
    ):
        if value is not None:
            plot.axhline(value, color="#444444", linewidth=1.0, linestyle=dash, zorder=2)
            plot.annotate(
                label, (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
                ha="right", fontsize=8, color="#444444",
            )  # fmt: skip
    for point in alternatives:
        plot.plot(point["bytes"], point["mean"]["value"], "o", mfc="white", mec="#222222", ms=7, zorder=4)
        plot.annotate(
            point["method"].removeprefix("copies as "), (point["bytes"], point["mean"]["value"]), xytext=(0, -13),
            textcoords="offset points", ha="center", fontsize=8, color="#222222",
        )  # fmt: skip
    plot.set_xscale("log", base=2)
    plot.set_xlim(axes.low_bytes, axes.high_bytes)
    plot.set_ylim(axes.low, axes.high)
    ticks = factor_ticks(axes.low_bytes / one, axes.high_bytes / one)
    plot.set_xticks([tick * one for tick in ticks], [f"{tick:.4g}x\n{human_bytes(tick * one)}" for tick in ticks])
    plot.minorticks_off()
    plot.set_xlabel("tensor data stored, in models and in bytes")
    plot.set_ylabel(printable(mean_title(record)))
    plot.yaxis.set_major_formatter(lambda value, _: f"{mean_scale(record) * value:g}")
    plot.grid(color="#e2e2e2", linewidth=0.7)
    plot.set_axisbelow(True)
    title = "chosen on data: " + record["data_dependent"]["arguments"] if record["data_dependent"] else ""
    plot.set_title(printable(title), fontsize=9)
    if record["points"]:
        plot.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    drawn_png = io.BytesIO()
    figure.savefig(drawn_png, format="png")
    write_file(path, drawn_png.getvalue())
