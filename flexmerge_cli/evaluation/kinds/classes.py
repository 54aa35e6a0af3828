"""Turns labels into class numbers, and scores of classes into metrics, for the kinds with classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexmerge_cli.evaluation.data import Column, Table
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Place
from flexmerge_cli.evaluation.loading import read_config
from flexmerge_cli.evaluation.metrics import METRICS, Takes
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.task_spec import TaskSpec

CLASS_METRICS = ("accuracy", "balanced_accuracy", "f1", "f1_macro", "matthews", "recall@k", AGREEMENT)
DEFAULT_LABELS = 2  # the number that transformers assumes if the config has none


def num_classes(task: TaskSpec, place: Place, head: str) -> int:
    """Return the number of outputs of the head, by the config, whose architecture must have one. Raises UsageError."""
    check_architecture(task, place, head)
    return label_count(read_config(place.side))


def check_architecture(task: TaskSpec, place: Place, *endings: str) -> str | None:
    """Return the config's architecture; None if it names none. Raises UsageError if it does not have the head."""
    architecture = architecture_of(read_config(place.side))
    if architecture is not None and not architecture.endswith(endings):
        wanted = " or ".join(f"…{ending}" for ending in endings)
        raise place.error(
            "kind",
            f"{task.kind} needs a model {wanted}, and {place.side}/config.json names {architecture}",
            hint="choose the kind that fits the model's head",
        )
    return architecture


def architecture_of(config: dict[str, Any]) -> str | None:
    """Return the first architecture that the config names; None if there is none, or the entry is malformed."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def label_names(config: dict[str, Any]) -> list[str]:
    """Return id2label in order of id; empty if there is none, or it is malformed."""
    names = config.get("id2label")
    try:
        return [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else []
    except ValueError:
        return []


def label_count(config: dict[str, Any]) -> int:
    """Return num_labels, or the length of id2label."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    count = config.get("num_labels", DEFAULT_LABELS)
    return count if isinstance(count, int) and count > 0 else DEFAULT_LABELS


def label_column(name: str | None) -> Column:
    return Column(name=name, usual=("label", "labels", "target", "class"))


def class_labels(table: Table, names: Sequence[str] | None, classes: int, place: Place) -> np.ndarray:
    """Return the column `label`, int64 [n], each in [0, classes).

    Texts are looked up in `labels` of the spec, else in the config's label2id; texts of digits are numbers if they are
    not names. Raises UsageError.
    """
    raw = table.columns["label"]
    if names is not None and len(names) > classes:
        raise place.error("labels", f"{len(names)} labels, but the model has {classes} classes", hint="check `labels`")
    try:
        labels = np.asarray(raw)
    except ValueError:  # lists of different lengths, which are reported below
        labels = np.empty(len(table), object)
    if labels.ndim == 1 and labels.dtype.kind in "USO" and all(isinstance(value, str) for value in raw):
        labels = _numbers_of(raw, names, table, place)
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise place.error(
            "columns.label",
            f"`{table.names['label']}` of {table.source} is {labels.dtype} {list(labels.shape)}",
            hint="labels are integers or names, one an example",
        )
    labels = labels.astype(np.int64)
    count = len(names) if names is not None else classes
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        whose = "`labels` names" if names is not None else "the model has"
        row, label = table.row(int(outside[0])), labels[outside[0]]
        raise place.error(
            "columns.label", f"{row} has label {label}, {whose} {count} classes", hint=f"labels are 0 to {count - 1}"
        )
    return labels


def _numbers_of(raw: Sequence[str], names: Sequence[str] | None, table: Table, place: Place) -> np.ndarray:
    known = {name: number for number, name in enumerate(names)} if names is not None else _label_ids(place)
    unknown = [index for index, name in enumerate(raw) if name not in known]
    if unknown and all(name.strip().isdecimal() for name in raw):
        return np.array([int(name) for name in raw])
    if unknown:
        seen = ", ".join(sorted(set(raw))[:20])
        raise place.error(
            "labels" if names is not None else "columns.label",
            f"{table.row(unknown[0])} has label {raw[unknown[0]][:60]!r}, known are {', '.join(list(known)[:20])}",
            hint=f"name the classes in the model's order: labels: [{seen}]",
        )
    return np.array([known[name] for name in raw])


def _label_ids(place: Place) -> dict[str, int]:
    config = read_config(place.side)
    found = config.get("label2id")
    if isinstance(found, dict) and all(isinstance(number, int) for number in found.values()):
        return found
    return {name: number for number, name in enumerate(label_names(config))}


def class_scores(logits: np.ndarray, labels: np.ndarray | None, metrics: Sequence[str]) -> list[Scored]:
    """Make one Scored per metric. logits: float32 [n, classes]. labels: int [n], None for agreement."""
    if labels is None:
        return [Scored(metric=AGREEMENT, predictions=logits)]
    of = {Takes.SCORES: logits, Takes.CLASSES: logits.argmax(-1)}
    return [Scored(metric=name, predictions=of[METRICS[name].takes], labels=labels) for name in metrics]
