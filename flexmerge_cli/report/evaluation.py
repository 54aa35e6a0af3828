"""What `eval` tells, as a table."""

from typing import Any

from flexmerge_cli.report.text import table


def show_evaluation(value: dict[str, Any]) -> None:
    worst = min(
        value["tasks"], key=lambda name: value["tasks"][name].get("normalised") or value["tasks"][name]["merged"]
    )
    rows = []
    for name, record in value["tasks"].items():
        low, high = record["merged_interval"]
        tuned, normalised = record["fine_tuned"], record.get("normalised")
        rows.append(
            (
                name + (" (worst)" if name == worst and len(value["tasks"]) > 1 else ""),
                record["n"],
                f"{100 * record['merged']:.1f}",
                f"{100 * low:.1f} … {100 * high:.1f}",
                "" if tuned is None else f"{100 * tuned:.1f}",
                "" if normalised is None else f"{100 * normalised:.1f}",
            )
        )
    mean = value["mean"]
    total = "" if mean["normalised"] is None else f"{100 * mean['normalised']:.1f}"
    rows.append(("mean", "", f"{100 * mean['merged']:.1f}", "", "", total))
    table(["task", "n", "accuracy %", "95 %", "fine-tuned %", "of it %"], rows)
    print(f"bundle of {value['factor']:.4f}x, {value['stored_bytes']:,} bytes of tensors")
