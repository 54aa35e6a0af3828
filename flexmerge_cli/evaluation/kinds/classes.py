"""What the kinds with classes share: labels as numbers of classes, and scores of classes as metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexmerge_cli.evaluation.data import Table
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Place
from flexmerge_cli.evaluation.loading import read_config
from flexmerge_cli.evaluation.metrics import METRICS, Takes
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.task_spec import TaskSpec

CLASS_METRICS = ("accuracy", "balanced_accuracy", "f1", "f1_macro", "matthews", "recall@k", AGREEMENT)
DEFAULT_LABELS = 2  # of a config that names none, as transformers has it


def num_classes(task: TaskSpec, place: Place, head: str) -> int:
    """Of the model, by its config, whose architecture must have such a head. Raises UsageError."""
    config = read_config(place.side)
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture is not None and not str(architecture).endswith(head):
        raise place.error(
            "kind",
            f"{task.kind} needs a model …{head}, and {place.side}/config.json names {architecture}",
            hint="choose the kind that fits the model's head",
        )
    return label_count(config)


def label_count(config: dict[str, Any]) -> int:
    """num_labels, or as many as id2label has."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    count = config.get("num_labels", DEFAULT_LABELS)
    return count if isinstance(count, int) and count > 0 else DEFAULT_LABELS


def class_labels(table: Table, column: str, names: Sequence[str] | None, classes: int, place: Place) -> np.ndarray:
    """int64 [n], each in [0, classes). Texts are looked up in `labels` of the spec, else in the config's label2id."""
    raw = table.columns[column]
    if names is not None and len(names) > classes:
        raise place.error("labels", f"{len(names)} labels, and the model has {classes} classes", hint="check `labels`")
    labels = np.asarray(raw)
    if labels.ndim != 1 or labels.dtype.kind not in "iubUSO" or (labels.dtype.kind == "O" and not _simple(raw)):
        raise place.error(
            "columns.label",
            f"`{column}` of {table.source} is {labels.dtype} {list(labels.shape)}",
            hint="labels are integers or names, one an example",
        )
    if labels.dtype.kind not in "iub":
        known = {name: number for number, name in enumerate(names)} if names is not None else _label_ids(place)
        strange = next((index for index, name in enumerate(raw) if str(name) not in known), None)
        if strange is not None:
            raise place.error(
                "labels" if names is not None else "columns.label",
                f"row {table.row(strange)} of {table.source} has label {str(raw[strange])[:60]!r}",
                hint=f"known: {', '.join(map(repr, list(known)[:20]))}; name the classes by `labels`, in their order",
            )
        labels = np.array([known[str(name)] for name in raw])
    labels = labels.astype(np.int64)
    count = len(names) if names is not None else classes
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        whose = "`labels` names" if names is not None else "the model has"
        row, label = table.row(int(outside[0])), labels[outside[0]]
        raise place.error(
            "columns.label",
            f"row {row} of {table.source} has label {label}, {whose} {count} classes",
            hint=f"labels are 0 to {count - 1}",
        )
    return labels


def _simple(raw: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in raw)


def _label_ids(place: Place) -> dict[str, int]:
    config = read_config(place.side)
    found = config.get("label2id")
    if isinstance(found, dict):
        return {str(name): int(number) for name, number in found.items()}
    found = config.get("id2label")
    return {str(name): int(number) for number, name in found.items()} if isinstance(found, dict) else {}


def class_scores(logits: np.ndarray, labels: np.ndarray | None, metrics: Sequence[str]) -> list[Scored]:
    """logits float32 [n, classes], labels int [n] (None for agreement) -> one Scored per metric."""
    if labels is None:
        return [Scored(metric=AGREEMENT, predictions=logits)]
    of = {Takes.SCORES: logits, Takes.CLASSES: logits.argmax(-1)}
    return [Scored(metric=name, predictions=of[METRICS[name].takes], labels=labels) for name in metrics]
