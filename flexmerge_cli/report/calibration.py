"""Shows the results of `calibrate`: each task's examples, runs of its model, and bytes by statistic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmerge_cli.report.table import say, table


def calibration_summary(rows: Sequence[dict[str, Any]], output: Path | None, *, written: bool) -> dict[str, Any]:
    """Return the document of `calibrate --json`. rows: those of calibration/make.py."""
    return {
        "calibration": str(output) if output is not None else None,
        "written": written,
        "tasks": {row["task"]: {key: value for key, value in row.items() if key != "task"} for row in rows},
        "total_bytes": sum(sum(row["bytes"].values()) for row in rows),
    }


def show_calibration(value: dict[str, Any]) -> None:
    tasks = value["tasks"]
    statistics = list(next(iter(tasks.values()))["bytes"])
    table(
        ["task", "examples", "runs", *(f"{name}\nbytes" for name in statistics), "largest", "bytes"],
        [
            [
                name,
                row["examples"],
                row["runs"],
                *(f"{row['bytes'][statistic]:,}" for statistic in statistics),
                row["largest"] or "",
                f"{row['largest_bytes']:,}",
            ]
            for name, row in tasks.items()
        ],
        text=(3 + len(statistics),),
    )
    if value["written"]:
        say(f"wrote {value['calibration']}: {value['total_bytes']:,} bytes of statistics")
    else:
        say(f"at most {value['total_bytes']:,} bytes of statistics; layers with the same inputs store them once")
