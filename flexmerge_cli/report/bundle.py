"""Shows the result of `merge`: a value for --json, and the same as tables."""

from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.allocation.options import served_bytes
from flexmerge_cli.report.evaluation import show_evaluation
from flexmerge_cli.report.table import say, table
from flexmerge_cli.report.text import human_bytes, merges_words


def merge_summary(
    layout: BundleLayout, output: Path | str, measured: Measured | None, *, warnings: list[str], threads: int | None
) -> dict[str, Any]:
    """Return files, bytes and memory, and after a run also the distances."""
    from flexmerge_cli.engine.merge_memory import merge_bytes
    from flexmerge_cli.engine.pool import default_threads

    plan = layout.plan
    files = {file.path: file.num_bytes for file in layout.files} | {file.path: file.num_bytes for file in layout.small}
    files["manifest.json"] = layout.total_bytes - sum(files.values())
    return {
        "bundle": str(output),
        "written": measured is not None,
        "request": layout.request.dump() if layout.request is not None else None,
        "methods": [use.text for use in layout.allocation.methods],
        "allocation": {
            "merges": layout.allocation.merges,
            "undone": layout.allocation.undone,
            "fit": layout.allocation.fit,
            "dtype": layout.allocation.dtype,
        },
        "factor": layout.tensor_bytes / max(1, plan.one_model_bytes),
        "tensor_bytes": layout.tensor_bytes,
        "total_bytes": layout.total_bytes,
        "unlinked_bytes": layout.unlinked_bytes,
        "served_bytes": served_bytes(layout),
        "files": files,
        "tasks": {
            task.name: {
                "route_bytes": layout.served_bytes(index),
                "distance": measured.task_distance.get(index, 0.0) if measured else None,
            }
            for index, task in enumerate(plan.readers)
        },
        "peak_memory_bytes": merge_bytes(layout, threads or default_threads()),
        "warnings": warnings,
    }


def show_verdict(value: dict[str, Any]) -> None:
    """Print the scores and the verdict of a recipe's gate, if the bundle was scored."""
    if "evaluation" in value:
        show_evaluation(value["evaluation"])


def show_part(value: dict[str, Any]) -> None:
    say(f"part {value['part']} of the bundle is written")
    say(f"with all parts there: flexmerge merge … --join -o {value['output']}")


def show_merge(value: dict[str, Any]) -> None:
    show_verdict(value)
    rows = [(name, f"{task['route_bytes']:,}") for name, task in value["tasks"].items()]
    if value["written"]:
        measured = [(*row, _distance(task["distance"])) for row, task in zip(rows, value["tasks"].values())]
        table(["task", "route bytes", "distance"], measured)
    else:
        table(["file", "bytes"], [(path, f"{size:,}") for path, size in sorted(value["files"].items())])
        if value["unlinked_bytes"] > value["total_bytes"]:
            say(f"{value['unlinked_bytes']:,} bytes for an upload that sends each link as a copy")
        say(f"estimated peak memory beyond Python and torch: {human_bytes(value['peak_memory_bytes'])}")
        table(["task", "route bytes"], rows)
    verb = "wrote" if value["written"] else "would write"
    say(
        f"{verb} {value['bundle']}: {value['factor']:.4f}x, {value['total_bytes']:,} bytes on disk in "
        f"{len(value['files'])} files{merges_words(value['allocation'], ', ')}"
    )


def show_update(value: dict[str, Any]) -> None:
    show_merge(value)
    of = value["update"]
    verb = "wrote" if value["written"] else "would write"
    say(
        f"weight files: kept {of['kept_files']} ({of['kept_bytes']:,} bytes); {verb} {of['written_files']} "
        f"({of['copied_bytes']:,} bytes copied from the old ones, {of['written_bytes']:,} computed)"
    )


def show_sizes(value: dict[str, Any]) -> None:
    """Show the bundles of several sizes, one per row."""
    rows = []
    for size, bundle in value["bundles"].items():
        distances = [task["distance"] for task in bundle["tasks"].values()]
        farthest = "null" if None in distances else _distance(max(distances, default=0.0))
        shown = "there already" if bundle["was_there"] else farthest if bundle["written"] else "-"
        rows.append((size, f"{bundle['factor']:.4f}x", f"{bundle['total_bytes']:,}", shown))
    table(["size", "of one model", "bytes on disk", "farthest task"], rows)


def _distance(value: float | None) -> str:
    return "null" if value is None else "exact" if value == 0 else f"{value:.4f}"
