"""Scores `regression`: a text, or a pair of texts, in; one number out. Pearson's and Spearman's correlation.

columns     text, pair (optional), label (a number)
max_length  tokens of an input; by default the tokenizer's
"""

from collections.abc import Sequence
from typing import Literal

from flexmerge_cli.evaluation.data import Column, read_table
from flexmerge_cli.evaluation.kinds.classes import num_classes
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.kinds.sequences import HEAD, SequenceTask, head_outputs, text_columns, tokenised
from flexmerge_cli.evaluation.scored import Scored, TaskModel


class Regression(SequenceTask):
    kind: Literal["regression"]


def prepare(task: Regression, place: Place) -> Examples:
    outputs = num_classes(task, place, HEAD)
    if outputs != 1:
        raise place.error("kind", f"the model's head has {outputs} outputs, not one", hint="kind: text-classification")
    metrics = chosen_metrics(task, place, KIND.metrics)
    wanted = text_columns(task.columns)
    label = Column(name=task.columns.label, usual=("label", "score", "labels", "target"))
    table = read_table(task, place, wanted | {"label": label})
    items = (tokenised(table, place, task), table.numbers("label", place))
    return Examples(items=items, n=len(table), digest=table.digest, split=table.split, metrics=metrics)


def score(model: TaskModel, task: Regression, examples: Examples, run: Run) -> Sequence[Scored]:
    encoded, labels = examples.items
    predictions = head_outputs(model, encoded, run)[:, 0]
    return [Scored(metric=name, predictions=predictions, labels=labels) for name in examples.metrics]


KIND = Kind(name="regression", schema=Regression, metrics=("pearson", "spearman"), prepare=prepare, score=score)
