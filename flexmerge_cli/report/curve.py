"""A curve on the terminal: the references, the mean score of every method at every size, and the files written."""

from typing import Any

from flexmerge_cli.evaluation.curve_record import NORMALISED
from flexmerge_cli.evaluation.evaluate import format_counts, one_metric
from flexmerge_cli.report.evaluation import show_gate
from flexmerge_cli.report.text import human_bytes, table


def show_curve(value: dict[str, Any]) -> None:
    tasks = value["tasks"]
    rows = [
        (name, record["metric"], record["n"], format_value(record["fine_tuned"]), format_value(record["base"]))
        for name, record in tasks.items()
    ]
    mean = value["mean"]
    rows.append(
        ("mean", one_metric(tasks) or NORMALISED, "", format_value(mean["fine_tuned"]), format_value(mean["base"]))
    )
    table(["task", "metric", "n", "fine-tuned", "base"], rows)
    gated = "gate" in value
    table(
        ["method", "size", "tensors", "on disk", "mean", "95 %", "of fine-tuned", "worst task", *["gate"] * gated],
        [
            (*_row(point), *[point["gate"]["outcome"] if "gate" in point else ""] * gated)
            for point in (*value["points"], *value["alternatives"])
        ],
    )
    unreached: dict[str, list[str]] = {}
    for item in value["unreached"]:
        unreached.setdefault(item["method"], []).append(item["size"])
    for method, sizes in unreached.items():
        print(f"{method} does not reach {', '.join(sizes)}")
    if value["data_dependent"]:
        print(f"data-dependent: {value['data_dependent']['arguments']}, chosen on {value['data_dependent']['spec']}")
    counts = value["evaluations"]
    print(f"{counts['asked']:,} evaluations: {format_counts(counts)}")
    chosen = value.get("chosen")
    if chosen is not None and chosen["qualifies"]:
        print(f"{chosen['message']}\n{chosen['command']}")
    if chosen is None and gated:
        show_gate(value)


def format_value(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"


def format_interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} … {interval[1]:.4f}"


def _row(point: dict[str, Any]) -> tuple[object, ...]:
    mean = point["mean"]
    worst = min(point["tasks"], key=lambda name: point["tasks"][name]["normalised"] or 0.0)
    part = point["tasks"][worst]["normalised"]
    return (
        point["method"],
        f"{point['factor']:.2f}x",
        human_bytes(point["bytes"]),
        human_bytes(point["total_bytes"]),
        format_value(mean["value"]),
        format_interval(mean["interval"]),
        "" if mean["normalised"] is None else f"{100 * mean['normalised']:.1f} %",
        worst + ("" if part is None else f" {100 * part:.1f} %"),
    )
