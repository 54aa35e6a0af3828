"""Shows vocabularies that differ between base and tasks, for `plan` and `inspect`."""

from typing import Any

from flexmerge_cli.checkpoint.rows import num_rows, other_rows
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.report.table import say, table

SHOWN_RUNS = 8


def vocabularies(plan: Plan) -> list[dict[str, Any]]:
    """Return tensors, the number of common rows, and per task its further rows and how rows were compared."""
    return [
        {
            "tensors": list(vocabulary.tensors),
            "common_rows": num_rows(vocabulary.base.common),
            "base_rows": vocabulary.base.rows,
            "base_rows_lacking": [list(run) for run in other_rows(vocabulary.base.common, vocabulary.base.rows)],
            "tasks": {
                task.name: {
                    "rows": rows.rows,
                    "own_rows": rows.rows - num_rows(rows.common),
                    "compared_by": "place" if rows.leading else "token",
                    "why": rows.leading,
                }
                for task, rows in zip(plan.tasks, vocabulary.tasks)
            },
        }
        for vocabulary in plan.vocabularies
    ]


def vocabulary_warnings(plan: Plan) -> list[str]:
    """Warn about rows that were compared by position although a tokenizer could have identified them."""
    found: dict[str, list[str]] = {}
    for vocabulary in plan.vocabularies:
        for task, rows in zip(plan.tasks, vocabulary.tasks):
            if rows.leading and task.name not in found.setdefault(rows.leading, []):
                found[rows.leading].append(task.name)
    return [
        f"rows of the vocabulary compared by place, the leading ones taken for the same tokens, in {', '.join(names)}: "
        f"{why}"
        for why, names in found.items()
    ]


def show_vocabularies(found: list[dict[str, Any]]) -> None:
    for vocabulary in found:
        table(
            ["task", "rows", "own\nrows", "compared by"],
            [
                (task, f"{of['rows']:,}", f"{of['own_rows']:,}", of["compared_by"])
                for task, of in vocabulary["tasks"].items()
            ],
            title=f"vocabulary of {', '.join(vocabulary['tensors'])}: {vocabulary['common_rows']:,} rows in all models",
        )
        lacking = vocabulary["base_rows_lacking"]
        if lacking:
            named = [f"{first}" if count == 1 else f"{first}–{first + count - 1}" for first, count in lacking]
            more = f", … {len(named) - SHOWN_RUNS} ranges more" if len(named) > SHOWN_RUNS else ""
            count = sum(count for _, count in lacking)
            say(f"rows of the base that some task lacks: {count:,} ({', '.join(named[:SHOWN_RUNS])}{more})")
