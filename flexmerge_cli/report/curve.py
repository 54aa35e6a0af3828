"""Shows a curve on the terminal: the references, the mean score of every method at every size, and the files
written."""

from typing import Any

from flexmerge_cli.evaluation.curve_record import NORMALISED
from flexmerge_cli.evaluation.evaluate import format_counts, one_metric
from flexmerge_cli.report.evaluation import show_gate
from flexmerge_cli.report.plane import show_plane
from flexmerge_cli.report.score_text import format_score, scale_of
from flexmerge_cli.report.table import say, table
from flexmerge_cli.report.text import human_bytes


def show_curve(value: dict[str, Any]) -> None:
    tasks = value["tasks"]
    rows = [
        (name, metric, record["n"], format_value(record["fine_tuned"], metric), format_value(record["base"], metric))
        for name, record in tasks.items()
        for metric in [record["metric"]]
    ]
    mean, metric = value["mean"], one_metric(tasks) or NORMALISED
    rows.append(("mean", metric, "", format_value(mean["fine_tuned"], metric), format_value(mean["base"], metric)))
    table(["task", "metric", "n", "fine-tuned", "base"], rows, text=(1,))
    gated = "gate" in value
    table(
        ["method", "size", "on disk", "mean", "95 %", "of fine-\ntuned %", "worst task, %", *["gate"] * gated],
        [
            (*_row(point, metric), *[point["gate"]["outcome"] if "gate" in point else ""] * gated)
            for point in (*value["points"], *value["alternatives"])
        ],
        text=(6, 7),
        keys=2,
    )
    if "ensembles" in value:
        show_ensembles(value)
    if "plane" in value:
        show_plane(value)
    unreached: dict[str, list[str]] = {}
    for item in value["unreached"]:
        unreached.setdefault(item["method"], []).append(item["size"])
    for method, sizes in unreached.items():
        say(f"{method} does not reach {', '.join(sizes)}")
    if value["data_dependent"]:
        say(f"data-dependent: {value['data_dependent']['arguments']}, chosen on {value['data_dependent']['spec']}")
    counts = value["evaluations"]
    say(f"{counts['asked']:,} evaluations: {format_counts(counts)}")
    chosen = value.get("chosen")
    if chosen is not None and chosen["qualifies"]:
        print(f"{chosen['message']}\n{chosen['command']}")
    if chosen is None and gated:
        show_gate(value)


ENSEMBLE_HEADS = ("ensemble", "size", "bytes", "passes", "mean", "of fine-\ntuned %", "of")


def show_ensembles(value: dict[str, Any]) -> None:
    """Print the ensembles of fine-tuned models, which a merge has to beat."""
    if value["ensembles"]:
        table(ENSEMBLE_HEADS, ensemble_rows(value), text=(6,), title="ensembles of the fine-tuned models")
    else:
        say("no ensembles: no two tasks have the same labels")


def ensemble_rows(value: dict[str, Any]) -> list[list[str]]:
    """Return the cells of each ensemble, under ENSEMBLE_HEADS. Means are over its tasks."""
    rows = []
    for found in value["ensembles"]:
        metric = one_metric({task: value["tasks"][task] for task in found["of"]}) or NORMALISED
        kept = found["mean"]["normalised"]
        rows.append(
            [
                found["rule"], f"{found['factor']:.2f}x", human_bytes(found["bytes"]), str(found["passes"]),
                format_value(found["mean"]["value"], metric), "" if kept is None else f"{100 * kept:.1f}",
                ", ".join(found["of"]),
            ]
        )  # fmt: skip
    return rows


def format_value(score: float | None, metric: str) -> str:
    """Format a score on the scale on which it is shown: percent, except for metrics such as perplexity."""
    return "" if score is None else format_score(score, scale_of(metric))


def format_interval(interval: list[float] | None, metric: str) -> str:
    return "" if interval is None else " … ".join(format_value(end, metric) for end in interval)


def _row(point: dict[str, Any], metric: str) -> tuple[object, ...]:
    mean = point["mean"]
    worst = min(point["tasks"], key=lambda name: point["tasks"][name]["normalised"] or 0.0)
    part = point["tasks"][worst]["normalised"]
    return (
        point["method"],
        f"{point['factor']:.2f}x",
        human_bytes(point["total_bytes"]),
        format_value(mean["value"], metric),
        format_interval(mean["interval"], metric),
        "" if mean["normalised"] is None else f"{100 * mean['normalised']:.1f}",
        worst + ("" if part is None else f" {100 * part:.1f}"),
    )
