"""Shows the result of `tune`: each task's examples, and its smallest, mean and largest weight over blocks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmerge_cli.methods.coefficients import Coefficients
from flexmerge_cli.report.table import say, table

LOSSES = {
    "surgery": ("mean |difference|\nof features", "corrected"),
    "wemoe": ("mean entropy\nof answers", "tuned"),
}
"""What `tune --bundle` lowers, before and after, by method."""


def tune_summary(found: Coefficients, output: Path) -> dict[str, Any]:
    """Return the document of `tune --json`."""
    by_task: list[dict[str, Any]] = [of for of in found.weights.values() if isinstance(of, dict)]
    by_task = by_task or [dict(found.weights)]
    return {
        "coefficients": str(output),
        "method": found.method,
        "tasks": {
            name: {"examples": task.n, "weights": [of[name] for of in by_task]} for name, task in found.tasks.items()
        },
    }


def fitting_summary(method: str, found: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Return the document of `tune --bundle --json`. found: what was fitted for each task."""
    rows = {
        task: {"examples": one.examples, "before": one.before, "after": one.after}
        | ({"layer": one.layer} if method == "surgery" else {})
        for task, one in found.items()
    }
    return {"bundle": str(output), "method": method, "tasks": rows}


def show_fitting(value: dict[str, Any]) -> None:
    rows = value["tasks"].items()
    cells = [[task, row["examples"], f"{row['before']:.4f}", f"{row['after']:.4f}"] for task, row in rows]
    table(["task", "examples", *LOSSES[value["method"]]], cells, text=(0,))
    say(f"wrote {value['bundle']}")


def show_tune(value: dict[str, Any]) -> None:
    table(
        ["task", "examples", "least\nweight", "mean", "largest"],
        [
            [name, row["examples"], *(f"{number:.3f}" for number in _spread(row["weights"]))]
            for name, row in value["tasks"].items()
        ],
        text=(0,),
    )
    path = value["coefficients"]
    say(f"wrote {path}, for --method weighted_average:weights=@{path},normalize=count")


def _spread(weights: list[float]) -> tuple[float, float, float]:
    return min(weights), sum(weights) / len(weights), max(weights)
