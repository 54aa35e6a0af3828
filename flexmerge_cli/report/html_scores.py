"""Shows a scored bundle, or its sources, as one page: the table, the bundle's place by its bytes, every number."""

from typing import Any

from flexmerge_cli.evaluation.curve_record import mean_of as mean_over_tasks
from flexmerge_cli.evaluation.curve_record import reference_means
from flexmerge_cli.evaluation.evaluate import format_counts, format_methods, one_metric
from flexmerge_cli.report.cross import cross_section
from flexmerge_cli.report.curve_series import metric_label, series_of
from flexmerge_cli.report.evaluation import remarks, score_table, tables_apart
from flexmerge_cli.report.html import facts, name, page, section, table, text
from flexmerge_cli.report.html_eval import eval_style, spec_facts, verdicts
from flexmerge_cli.report.html_eval_chart import curve_chart, mean_of
from flexmerge_cli.report.router import routed_section
from flexmerge_cli.report.score_text import format_score, interval_cells, scale_of
from flexmerge_cli.report.text import human_bytes

COPIES = "copies"
"""The name of the fine-tuned models, unmerged."""


def scores_page(document: dict[str, Any], source: str) -> str:
    """Make the whole page. document: from `evaluate`. source: the name of the bundle or plan."""
    tasks, counts = document["tasks"], document["evaluations"]
    pairs = [
        ("tasks", f"{len(tasks)} of {document['num_models']} models" if "bundle" in document else str(len(tasks))),
        ("evaluations", format_counts(counts)),
    ]
    if "bundle" in document:
        pairs += [
            ("size", f"{document['factor']:.4f}x"),
            ("tensors", f"{document['stored_bytes']:,} bytes"),
            ("on disk", f"{document['total_bytes']:,} bytes"),
            ("method", text(format_methods(document))),
            ("id", f"<span class=path>{text(document['bundle'][:16])}…</span>"),
        ]
    curve = as_curve(document)
    series = series_of(curve) if curve is not None else []
    title = f"{source}: scores of {len(tasks)} tasks" + ("" if "bundle" in document else ", sources")
    sections = [eval_style(series), *verdicts(document), _table(document)]
    sections += [cross_section(document) if "cross" in document else ""]
    sections += [routed_section(document) if "router" in document else ""]
    sections += [_place(curve) if curve is not None else "", _numbers(document)]
    return page(title, facts([*pairs, *spec_facts(document)]), filter(None, sections))


def as_curve(document: dict[str, Any]) -> dict[str, Any] | None:
    """Make a curve whose only point is a bundle, beside copies of the fine-tuned models if their scores are known.

    None without a bundle, if a task has no score, or if metrics differ and the fine-tuned scores are not known.
    """
    if "bundle" not in document or not _has_all(document, "merged"):
        return None
    if one_metric(document["tasks"]) is None and not _has_all(document, "fine_tuned"):
        return None
    one, models = document["one_model_bytes"], document["num_models"]
    own = {
        "method": format_methods(document), "bytes": document["stored_bytes"], "factor": document["factor"],
        "total_bytes": document["total_bytes"],
    }  # fmt: skip
    copies = {"method": COPIES, "bytes": models * one, "total_bytes": models * one, "factor": float(models)}
    return {
        "one_model_bytes": one,
        "tasks": document["tasks"],
        "mean": reference_means(document["tasks"]),
        "points": [_point(own, document, "merged")],
        "alternatives": [_point(copies, document, "fine_tuned")] if _has_all(document, "fine_tuned") else [],
    }


def _has_all(document: dict[str, Any], who: str) -> bool:
    """Return whether all tasks have a value with an interval; a perplexity that overflows has none."""
    return all(record[f"{who}_interval"] is not None for record in document["tasks"].values())


def _point(of: dict[str, Any], document: dict[str, Any], who: str) -> dict[str, Any]:
    tasks = {
        task: {"value": record[who], "interval": record[f"{who}_interval"], "normalised": None}
        for task, record in document["tasks"].items()
    }
    return of | {"sizes": [], "tasks": tasks, "mean": mean_over_tasks(tasks, document["tasks"])}


def _table(document: dict[str, Any]) -> str:
    parts = []
    for title, columns, rows, words in (("", *score_table(document), 2), *tables_apart(document)):
        cells = [[name(row[0]) if place == 0 else text(cell) for place, cell in enumerate(row)] for row in rows]
        parts += [f"<h3>{text(title)}</h3>" if title else "", table(columns, cells, left=words)]
    notes = "".join(f"<p class=note>{text(line)}</p>" for line in remarks(document))
    return section("Scores", *parts, notes)


def _place(curve: dict[str, Any]) -> str:
    mean, copies = curve["mean"], "; the circle: copies of all models" if curve["alternatives"] else ""
    picture = curve_chart(
        series_of(curve), curve, mean_of, fine_tuned=mean["fine_tuned"], base=mean["base"], height="min(22rem, 60vh)",
        says="mean score of the bundle against its bytes; all numbers are in the tables",
    )  # fmt: skip
    return section(
        "Accuracy against size",
        picture,
        note=f"Mean over the tasks: {metric_label(curve)}, with its 95 % interval{copies}. Other sizes and methods: "
        "flexmerge curve.",
    )


def _numbers(document: dict[str, Any]) -> str:
    """Show every number with its evidence."""
    rows = []
    for task, record in (document["tasks"] | document.get("unseen", {})).items():
        for who, first in record["scores"].items():
            for scored in (first, *first["others"]):
                scale, size = scale_of(scored["metric"]), scored["bytes"]
                rows.append(
                    [
                        name(task), text(who.replace("_", "-")), text(scored["metric"]),
                        format_score(scored["value"], scale), interval_cells(scored["interval"], scale)[1],
                        f"{scored['n']:,}" if scored["n"] else "", text(scored["split"] or ""),
                        "" if size is None else human_bytes(size),
                        f"<span class=path>{text(scored['weights'][:12])}</span>",
                    ]
                )  # fmt: skip
    heads = ["task", "model", "metric", "score", "95 %", "n", "split", "model's bytes", "weights"]
    return section("Every number", table(heads, rows, left=3))
