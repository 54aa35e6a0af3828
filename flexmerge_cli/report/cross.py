"""Shows the cross-task matrix of `eval --cross`, a row per model and a column per task's data, on terminal and page."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.report.html import cell_style, cells, legend, name, section, text
from flexmerge_cli.report.inspect_heat import Scale
from flexmerge_cli.report.score_text import format_score, scale_of
from flexmerge_cli.report.table import say, table

READING = (
    "Each row is a model with its own head, each column a task's data; the base has the head of the data's task. Where "
    "there is no number, the head does not fit the data"
)
WORDS = {"labels≠": "other labels", "head≠": "another kind of head", "data≠": "other inputs"}
MODELS = {"fine_tuned": "fine-tuned models", "merged": "merged models"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A score, or a word that says why there is none."""

    metric: str
    value: float | None
    word: str = ""
    reason: str = ""

    @property
    def text(self) -> str:
        return self.word or format_score(self.value, scale_of(self.metric))


def show_cross(document: Mapping[str, Any]) -> None:
    """Print the matrix. document: from `evaluate`, with `cross`."""
    for title, rows in matrix(document).items():
        cells = [[row, *(cell.text for cell in cells)] for row, cells in rows.items()]
        table(["model of", *document["tasks"]], cells, title=f"{title} on every task's data")
    say(reading(document))


def matrix(document: Mapping[str, Any]) -> dict[str, dict[str, list[Cell]]]:
    """Return rows by the task of their model, for each kind of model that was scored; one column per task of the
    data."""
    tasks, found = document["tasks"], {}
    for who, title in MODELS.items():
        if any(who in record["scores"] for record in tasks.values()):
            found[title] = {task: [_cell(document, task, of, who) for of in tasks] for task in tasks}
    if all(record["base"] is not None for record in tasks.values()):
        found["base"] = {"base": [_cell(document, task, task, "base") for task in tasks]}
    return found


def reading(document: Mapping[str, Any]) -> str:
    """Say how to read the table, with the words that occur in it."""
    words = {cell.word for rows in matrix(document).values() for cells in rows.values() for cell in cells} - {""}
    counts = sorted(words - set(WORDS))
    said = [f"{word}, other numbers of classes" for word in counts[:1]]
    said += [f"{word}, {meaning}" for word, meaning in WORDS.items() if word in words]
    return READING + (f": {'; '.join(said)}." if said else ".")


def cross_section(document: Mapping[str, Any]) -> str:
    """Draw the matrix as heat maps. The colour of a cell is its place between the worst and the best of its metric."""
    found, parts = matrix(document), []
    scales = _scales(cell for rows in found.values() for each in rows.values() for cell in each)
    head = [f"<th scope=col>{name(task)}</th>" for task in document["tasks"]]
    for title, rows in found.items():
        grid = cells(head, ((name(row), (_markup(cell, scales) for cell in each)) for row, each in rows.items()))
        parts.append(f"<h3>{text(title)}</h3>{grid}")
    note = reading(document)
    return section("Every model on every task", legend("worst", "best", gaps=True), *parts, note=note)


def _cell(document: Mapping[str, Any], task: str, of: str, who: str) -> Cell:
    """Return the score of a task's model on the data of task `of`."""
    found = document["tasks"][task]["scores"] if task == of else document["cross"][task][of]
    if "mismatch" in found:
        return Cell("", None, found["mismatch"], found["reason"])
    return Cell(found[who]["metric"], found[who]["value"]) if who in found else Cell("", None)


def _scales(cells: Iterable[Cell]) -> dict[str, Scale]:
    """Return the range of each metric's scores."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        if cell.value is not None:
            found.setdefault(cell.metric, []).append(cell.value)
    return {metric: Scale.over(np.array(values)) for metric, values in found.items()}


def _markup(cell: Cell, scales: Mapping[str, Scale]) -> str:
    if cell.value is None:
        return f'<td class=off title="{text(cell.reason)}">{text(cell.text)}</td>'
    scale = scales[cell.metric]
    if cell.metric in METRICS and not METRICS[cell.metric].higher_is_better:
        style = cell_style(Scale(low=-scale.high, high=-scale.low), -cell.value)
    else:
        style = cell_style(scale, cell.value)
    return f'<td style="{style}">{text(cell.text)}</td>'
