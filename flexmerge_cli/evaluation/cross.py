"""Decides which models can be scored on another task's data, for `eval --cross`. Reads configs and data, no weights.

A model keeps its own head. If the labels of its head differ from those of the data, there is no score, and a
`Mismatch` says why.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.evaluation.kinds.classes import architecture_of, label_count, label_names
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT
from flexmerge_cli.evaluation.loading import read_config
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.evaluation.spec import EvalSpec

WHOS = ("merged", "fine_tuned")
"""The models that are scored on other tasks' data. The base has no head of its own."""
UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a model has no score on a task's data."""

    word: str
    """For the cell of a table: `2≠10` classes, `labels≠`, `head≠`, `data≠`."""
    reason: str
    """The same as a sentence."""


def mismatches(
    scorer: Scorer, task: str, folders: Mapping[str, Path], *, named: bool = False
) -> dict[str, Mismatch | None]:
    """Say for each other task of the spec why the models of `task` cannot be scored on its data; None if they can.

    folders: maps each task to the folder of its side files. The examples that can be scored are prepared, with the
    model's own tokenizer or processor. named: classes without names, such as LABEL_0, are a mismatch, too.
    """
    others = [other for other in scorer.spec.tasks if other != task]
    return {other: _mismatch(scorer, task, other, folders, named) for other in others}


def _mismatch(scorer: Scorer, task: str, other: str, folders: Mapping[str, Path], named: bool) -> Mismatch | None:
    heads = _Head.of(scorer.spec, task, folders[task]), _Head.of(scorer.spec, other, folders[other])
    found = _between(*heads, named=named)
    if found is not None:
        return found
    try:
        examples = scorer.examples(other, folders[task])
    except FlexmergeError as error:
        return Mismatch("data≠", f"the data do not fit the model: {error.message}")
    if AGREEMENT in examples.metrics:
        return Mismatch("data≠", f"`{AGREEMENT}` compares only a task's own models")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The outputs of a model, by its config and the spec."""

    name: str | None
    """The end of the architecture's name, such as `ForImageClassification`; None if the config names none."""
    classes: int | None
    labels: tuple[str, ...]
    """Empty if neither names them."""

    @staticmethod
    def of(spec: EvalSpec, task: str, folder: Path) -> "_Head":
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        architecture = architecture_of(config)
        name = None if architecture is None else architecture[max(0, architecture.find("For")) :]
        if name is None or not name.endswith("Classification"):
            return _Head(name=name, classes=None, labels=())
        written = getattr(spec.entry(task), "labels", None)
        labels = tuple(written or label_names(config))
        return _Head(
            name=name, classes=label_count(config), labels=() if any(map(UNNAMED.fullmatch, labels)) else labels
        )


def _between(model: _Head, data: _Head, *, named: bool) -> Mismatch | None:
    if None not in (model.name, data.name) and model.name != data.name:
        return Mismatch("head≠", f"the model is {model.name}, and the data are for {data.name}")
    if model.classes != data.classes:
        return Mismatch(
            f"{model.classes}≠{data.classes}", f"the head has {model.classes} classes, and the data {data.classes}"
        )
    if named and model.classes is not None and not (model.labels and data.labels):
        return Mismatch("labels≠", "the classes have no names that could be the same")
    if model.labels and data.labels and model.labels != data.labels:
        both = (", ".join(labels[:3]) + ("…" if len(labels) > 3 else "") for labels in (model.labels, data.labels))
        return Mismatch("labels≠", "the labels of the head are {}, and those of the data {}".format(*both))
    return None
