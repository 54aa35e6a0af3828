"""Scores `text-classification`: a text, or a pair of texts, in; one class out.

columns     text, pair (optional), label (numbers or names)
labels      names of the classes, in their order; by default the config's
max_length  tokens of an input; by default the tokenizer's
"""

from collections.abc import Sequence
from typing import Literal

from flexmerge_cli.evaluation.data import read_table
from flexmerge_cli.evaluation.kinds.classes import CLASS_METRICS, class_labels, class_scores, label_column, num_classes
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.kinds.sequences import HEAD, SequenceTask, head_outputs, text_columns, tokenised
from flexmerge_cli.evaluation.scored import Scored, TaskModel


class TextClassification(SequenceTask):
    kind: Literal["text-classification"]
    labels: tuple[str, ...] | None = None


def prepare(task: TextClassification, place: Place) -> Examples:
    classes = num_classes(task, place, HEAD)
    if classes < 2:
        raise place.error("kind", "the model's head has one output, so it has no classes", hint="kind: regression")
    metrics = chosen_metrics(task, place, KIND.metrics, num_classes=classes)
    labelled = AGREEMENT not in metrics
    wanted = text_columns(task.columns)
    table = read_table(task, place, wanted | ({"label": label_column(task.columns.label)} if labelled else {}))
    labels = class_labels(table, task.labels, classes, place) if labelled else None
    items = (tokenised(table, place, task), labels)
    return Examples(items=items, n=len(table), digest=table.digest, split=table.split, metrics=metrics)


def score(model: TaskModel, task: TextClassification, examples: Examples, run: Run) -> Sequence[Scored]:
    encoded, labels = examples.items
    return class_scores(head_outputs(model, encoded, run), labels, examples.metrics)


KIND = Kind(name="text-classification", schema=TextClassification, metrics=CLASS_METRICS, prepare=prepare, score=score)
