"""What `merge` shows: a value for --json, and the same as tables."""

from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.bill import Bill
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.allocation.ways import served_bytes
from flexmerge_cli.report.evaluation import show_evaluation
from flexmerge_cli.report.text import human_bytes, merges_words, table


def merge_summary(
    bill: Bill, output: Path, measured: Measured | None, *, warnings: list[str], threads: int | None
) -> dict[str, Any]:
    """Files, bytes and memory; after a run also the distances."""
    from flexmerge_cli.engine.merge_memory import merge_bytes
    from flexmerge_cli.engine.pool import default_threads

    plan = bill.plan
    files = {file.path: file.num_bytes for file in bill.files} | {file.path: file.num_bytes for file in bill.small}
    files["manifest.json"] = bill.total_bytes - sum(files.values())
    return {
        "bundle": str(output),
        "written": measured is not None,
        "request": bill.request.dump() if bill.request is not None else None,
        "methods": [use.text for use in bill.allocation.methods],
        "allocation": {
            "merges": bill.allocation.merges,
            "undone": bill.allocation.undone,
            "fit": bill.allocation.fit,
            "dtype": bill.allocation.dtype,
        },
        "factor": bill.tensor_bytes / max(1, plan.one_model_bytes),
        "tensor_bytes": bill.tensor_bytes,
        "total_bytes": bill.total_bytes,
        "served_bytes": served_bytes(bill),
        "files": files,
        "tasks": {
            task.name: {
                "route_bytes": bill.served_bytes(index),
                "distance": measured.task_distance.get(index, 0.0) if measured else None,
            }
            for index, task in enumerate(plan.readers)
        },
        "peak_memory_bytes": merge_bytes(bill, threads or default_threads()),
        "warnings": warnings,
    }


def show_verdict(value: dict[str, Any]) -> None:
    """Print the scores and the verdict of a recipe's gate, if the bundle was scored."""
    if "evaluation" in value:
        show_evaluation(value["evaluation"])


def show_merge(value: dict[str, Any]) -> None:
    show_verdict(value)
    rows = [(name, f"{task['route_bytes']:,}") for name, task in value["tasks"].items()]
    if value["written"]:
        measured = [(*row, _distance(task["distance"])) for row, task in zip(rows, value["tasks"].values())]
        table(["task", "route bytes", "distance"], measured)
    else:
        table(["file", "bytes"], [(path, f"{size:,}") for path, size in sorted(value["files"].items())])
        print(f"estimated peak memory beyond Python and torch: {human_bytes(value['peak_memory_bytes'])}")
        table(["task", "route bytes"], rows)
    verb = "wrote" if value["written"] else "would write"
    print(
        f"{verb} {value['bundle']}: {value['factor']:.4f}x, {value['total_bytes']:,} bytes on disk in "
        f"{len(value['files'])} files{merges_words(value['allocation'], ', ')}"
    )


def _distance(value: float | None) -> str:
    return "null" if value is None else "exact" if value == 0 else f"{value:.4f}"
