"""Reads the document of `flexmerge eval --json` again, for a bundle's card."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.card import Scores, TaskScore
from flexmerge_cli.checkpoint.weights import read_json
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.evaluate import FORMAT
from flexmerge_cli.evaluation.metrics import METRICS

MAX_DOCUMENT_BYTES = 64 << 20


def read_scores(path: Path) -> Scores:
    """Read the scores. Raises SourceError, DataError, and UsageError if the file does not hold a bundle's scores."""
    document = read_json(path, MAX_DOCUMENT_BYTES)
    bundle, tasks = document.get("bundle"), document.get("tasks")
    if document.get("format") != FORMAT or not isinstance(bundle, str) or not isinstance(tasks, dict):
        raise UsageError(f"{path} does not hold scores of a bundle", hint="flexmerge eval bundle/ --spec … --json")
    return scores_of(document)


def scores_of(document: Mapping[str, Any]) -> Scores:
    """Return the scores of a document."""
    return Scores(bundle=document["bundle"], tasks={name: _score(one) for name, one in document["tasks"].items()})


def _score(record: Any) -> TaskScore:
    fields = record if isinstance(record, dict) else {}
    metric = str(fields.get("metric"))
    percent = metric in METRICS and METRICS[metric].percent

    def shown(value: Any) -> str:
        if not isinstance(value, int | float) or not isfinite(value):
            return "–"
        return f"{100 * value:.1f} %" if percent else f"{value:.4g}"

    return TaskScore(metric=metric, merged=shown(fields.get("merged")), fine_tuned=shown(fields.get("fine_tuned")))
