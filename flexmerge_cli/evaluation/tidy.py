"""Writes scores as tidy CSV, one row per score, with the same columns for curves, bundles and sources.

method   the requested method of a curve's point, or the methods of a bundle; `fine-tuned` and `base` for those models
sizes, bytes, total_bytes, factor   the size of the bundle, written or not; empty for other models
task, metric, n, split, value, low, high, weights   one number, its 95 % interval, the digest of what was scored
model    the task whose model was scored, if the data are of another: an unseen task, or with `eval --cross`
corruption   what was done to the images, such as gaussian_noise@3
normalised, fine_tuned, base   for the task's first metric: the fraction of the fine-tuned score, and the references'
         scores
Curves have only the first metric of each task, and no rows for the references.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from flexmerge_cli.evaluation.evaluate import format_methods
from flexmerge_cli.writing import has_start

COLUMNS = (
    "method", "sizes", "bytes", "total_bytes", "factor", "task", "model", "corruption", "metric", "n", "split", "value",
    "low", "high", "normalised", "fine_tuned", "base", "weights",
)  # fmt: skip
Row = Mapping[str, Any]


def is_csv(path: Path) -> bool:
    """Return whether a file has these columns, so that --csv may replace it with --force."""
    return has_start(path, f"{','.join(COLUMNS)}\n".encode())


def curve_csv(record: Mapping[str, Any]) -> str:
    """Write one row per point and task. record: from `curve_record`."""
    return _csv(chain(_of_points(record), _of_ensembles(record), _of_plane(record)))


def scores_csv(document: dict[str, Any]) -> str:
    """Write one row per task, model and metric. document: from `evaluate`."""
    return _csv(_of_scores(document))


def _of_points(record: Mapping[str, Any]) -> Iterator[Row]:
    for point in (*record["points"], *record["alternatives"]):
        for task, scored in point["tasks"].items():
            reference = record["tasks"][task]
            yield {
                **_size(point), "method": point["method"], "sizes": " ".join(point["sizes"]), "task": task,
                "metric": reference["metric"], "n": reference["n"],
                "split": reference["scores"]["fine_tuned"]["split"], **_value(scored),
                "normalised": scored["normalised"], "fine_tuned": reference["fine_tuned"], "base": reference["base"],
                "weights": scored["weights"],
            }  # fmt: skip


def _of_ensembles(record: Mapping[str, Any]) -> Iterator[Row]:
    for found in record.get("ensembles", ()):
        for task, scored in found["tasks"].items():
            reference = record["tasks"][task]
            yield {
                "method": f"ensemble {found['rule']}", "bytes": found["bytes"], "factor": found["factor"], "task": task,
                "metric": reference["metric"], "n": reference["n"],
                "split": reference["scores"]["fine_tuned"]["split"], **_value(scored),
                "normalised": scored["normalised"], "fine_tuned": reference["fine_tuned"], "base": reference["base"],
            }  # fmt: skip


def _of_plane(record: Mapping[str, Any]) -> Iterator[Row]:
    plane = record.get("plane", {"points": ()})
    for point in plane["points"]:
        for task, scored in point["tasks"].items():
            reference = record["tasks"][task]
            yield {
                "method": f"plane {','.join(plane['tasks'])} at {point['a']:g},{point['b']:g}", "task": task,
                "metric": reference["metric"], "n": reference["n"],
                "split": reference["scores"]["fine_tuned"]["split"], **_value(scored),
                "normalised": scored["normalised"], "fine_tuned": reference["fine_tuned"], "base": reference["base"],
            }  # fmt: skip


def _of_scores(document: dict[str, Any]) -> Iterator[Row]:
    yield from _of_records(document, document["tasks"] | document.get("unseen", {}))
    for corruption, found in document.get("corrupted", {}).items():
        for row in _of_records(document, found["tasks"]):
            yield {**row, "corruption": corruption}
    for model, others in document.get("cross", {}).items():
        for task, found in others.items():
            for who, first in found.items() if "mismatch" not in found else ():
                for scored in (first, *first["others"]):
                    yield {**_model(document, who), "task": task, "model": model, **_number(scored)}


def _of_records(document: dict[str, Any], records: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    for task, record in records.items():
        for who, first in record["scores"].items():
            is_merged = who == "merged"
            of = _model(document, who)
            for place, scored in enumerate((first, *first["others"])):
                references = {
                    other: (found, *found["others"])[place]["value"]
                    for other, found in record["scores"].items()
                    if other != "merged"
                }
                normalised = record["normalised"] if is_merged and place == 0 else None
                its: Row = {"task": task, "model": record.get("head"), "normalised": normalised}
                yield {**of, **references, **its, **_number(scored)}


def _model(document: dict[str, Any], who: str) -> Row:
    """Return what was scored: a bundle with its size, or a reference."""
    if who != "merged":
        return {"method": who.replace("_", "-")}
    return {"method": format_methods(document), **_size(document | {"bytes": document["stored_bytes"]})}


def _number(scored: Mapping[str, Any]) -> Row:
    return {**{key: scored[key] for key in ("metric", "n", "split", "weights")}, **_value(scored)}


def _size(of: Mapping[str, Any]) -> Row:
    return {key: of[key] for key in ("bytes", "total_bytes", "factor")}


def _value(scored: Mapping[str, Any]) -> Row:
    low, high = scored["interval"] or (None, None)
    return {"value": scored["value"], "low": low, "high": high}


def _csv(rows: Iterable[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
