"""Shows the table by which to choose a bundle, and the sizes along the merge order, for `plan` and `inspect`."""

from typing import Any

import numpy as np

from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.allocation.options import COPIES, EXACT, begin_with, storage_options
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.report.table import say, table

BEGIN = "*"
DISTANCE_NOTE = (
    "Distance compares sizes of one method and nothing else: on seven MiniLM fine-tunes average at 1x has distance "
    "0.88 and kept 71.9 % of the accuracy, tsv_m 2.3 and 93.3 %, auto at 0.25x 8.0 and 100.8 %."
)
KEPT_NOTE = (
    "kept: percent of the fine-tuned score, measured on the families of docs/benchmarks.md, not on yours; bits: of "
    "tensor data, per weight and task; served: memory with every task loaded"
)


def options_value(plan: Plan, path: str, *, all_methods: bool = False) -> dict[str, Any]:
    """Return `options`, by their bytes on disk, and `begin_with`: the name of one and why, or null."""
    rows = storage_options(Pricer(plan), path, all_methods=all_methods)
    begin = begin_with(rows)
    return {
        "options": [
            {
                "name": row.name,
                "disk_bytes": row.disk_bytes,
                "served_bytes": row.served_bytes,
                "factor": row.tensor_bytes / max(1, plan.one_model_bytes),
                "bits": row.bits,
                "kept": None if row.kept is None else list(row.kept),
                "is_larger": row.is_larger,
                "command": row.command,
            }
            for row in rows
        ],
        "begin_with": None if begin is None else {"name": begin[0], "why": begin[1]},
    }


def shown_options(value: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells under OPTION_HEADS of the rows that are no larger than copies as found."""
    begin = (value["begin_with"] or {}).get("name")
    return [
        (
            f"{row['name']} {BEGIN}" if row["name"] == begin else row["name"],
            f"{row['factor']:.2f}x",
            f"{row['bits']:.1f}",
            f"{row['disk_bytes']:,}",
            f"{row['served_bytes']:,}",
            _kept(row),
        )
        for row in value["options"]
        if not row["is_larger"]
    ]


OPTION_HEADS = ("way to store them", "size", "bits", "on disk", "served", "kept %")


def show_options(value: dict[str, Any]) -> None:
    """Print the table, the row to begin with, and the commands."""
    table(OPTION_HEADS, shown_options(value))
    say(KEPT_NOTE)
    for line in option_remarks(value):
        say(line)
    shown = [row for row in value["options"] if row["command"] and not row["is_larger"]]
    widest = max((len(row["name"]) for row in shown), default=0)
    for row in shown:
        print(f"{row['name']:{widest}}  {row['command']}")


def option_remarks(value: dict[str, Any]) -> list[str]:
    """Say which row to begin with, and which are left out."""
    begin, larger = value["begin_with"], [row["name"] for row in value["options"] if row["is_larger"]]
    return [
        *([f"{BEGIN} begin with {begin['name']}: {begin['why']}"] if begin else []),
        *([f"left out, since they are larger than copies as found: {', '.join(larger)}"] if larger else []),
    ]


def size_row(plan: Plan, size: str, merges: int, tensor_bytes: int, distance: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return what `plan` and `inspect` show of a named size. distance: per method [M], NaN if a task has none."""
    return {
        "size": size,
        "factor": tensor_bytes / max(1, plan.one_model_bytes),
        "tensor_bytes": tensor_bytes,
        "merges": merges,
        "groups": len(plan.blocks) * len(plan.tasks) - merges,
        "distance": {
            method: {
                task: None if np.isnan(value) else float(value) for task, value in zip(plan.task_names, distance_M)
            }
            for method, distance_M in distance.items()
        },
    }


def show_sizes(sizes: list[dict[str, Any]]) -> None:
    """Print what a dense value per merged block takes at each size, and the distance of `average` there."""
    rows = []
    for row in sizes:
        known = [found for found in row["distance"]["average"].values() if found is not None]
        cells = [f"{found:.3f}" for found in (sum(known) / len(known), max(known))] if known else ["null", "null"]
        size, is_ = row["size"], f"{row['factor']:.2f}x"
        rows.append((size, is_, f"{row['tensor_bytes']:,}", f"{row['merges']:,}", f"{row['groups']:,}", *cells))
    heads = ["size", "is", "bytes", "merges", "groups", "distance ≈\nmean", "\nworst"]
    table(heads, rows, title="sizes with one dense value per merged block, and the distance of average there")
    say(DISTANCE_NOTE)


def _kept(row: dict[str, Any]) -> str:
    if row["kept"] is None:
        return ""
    low, high = (f"{part:.1f}" for part in row["kept"])
    return "all" if row["name"] in (COPIES, EXACT) else low if low == high else f"{low} … {high}"
