"""Score every task of a bundle on its own routed view, and beside it its fine-tuned model and the base.

`flexmerge.eval/1`, one JSON document:
tasks  {name: {kind, metric, higher_is_better, n, split, merged, fine_tuned, base, normalised, …_interval, scores}};
       scores {merged, fine_tuned, base: {value, n, interval, split, metric, weights, bytes, notes, others}}
mean   of merged scores, and of normalised ones where every task has one
data   {task: digest of its examples}
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.evaluation.intervals import interval
from flexmerge_cli.evaluation.metrics import normalised
from flexmerge_cli.evaluation.models import bundle_model, source_model
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.evaluation.spec import EvalSpec

FORMAT = "flexmerge.eval/1"
OnTask = Callable[[str, int, int], None]


def evaluate(
    bundle: Bundle, spec: EvalSpec, *, scorer: Scorer | None = None, on_task: OnTask = lambda *_step: None
) -> dict[str, Any]:
    """One record per task. One model is in memory at a time.

    Raises UsageError before a weight is read where spec, data or side files do not fit, DataError for weights that
    do not.
    """
    scorer = scorer or Scorer(spec=spec)
    for name in spec.tasks:
        scorer.examples(name, bundle.path / "tasks" / name)
    records: dict[str, Any] = {}
    for done, name in enumerate(spec.tasks):
        on_task(name, done, len(spec.tasks))
        models = {"merged": bundle_model(bundle, name)}
        source = spec.tasks[name].checkpoint
        if source is not None:
            models["fine_tuned"] = source_model(name, source, relative_to=spec.folder)
        found = {who: scorer.score(model, reference=models.get("fine_tuned")) for who, model in models.items()}
        records[name] = task_record(spec, name, models, found)
    return {
        "format": FORMAT,
        "bundle": bundle.manifest.id,
        "stored_bytes": bundle.manifest.stored_bytes,
        "factor": bundle.manifest.stored_bytes / max(1, bundle.manifest.one_model_bytes),
        "tasks": records,
        "mean": means(records),
    }


def task_record(spec: EvalSpec, task: str, models: dict[str, TaskModel], found: dict[str, Scored]) -> dict[str, Any]:
    """What a report says of one task. models, found: of `merged`, `fine_tuned`, `base`; what is missing is null."""
    data = spec.tasks[task].data_spec
    scores = {
        who: score_record(scored, models[who], split=data.split if data else None) for who, scored in found.items()
    }
    first = next(iter(found.values()))
    record: dict[str, Any] = {
        "kind": spec.tasks[task].kind,
        "metric": first.metric,
        "higher_is_better": first.higher_is_better,
        "n": first.n,
    }
    for who in ("merged", "fine_tuned", "base"):
        record[who] = scores[who]["value"] if who in scores else None
        record[f"{who}_interval"] = scores[who]["interval"] if who in scores else None
    both = record["merged"] is not None and record["fine_tuned"] is not None
    record["normalised"] = (
        normalised(record["merged"], record["fine_tuned"], higher_is_better=first.higher_is_better) if both else None
    )
    record["route_bytes"] = models["merged"].num_bytes if "merged" in models else None
    return record | {"scores": scores}


def score_record(scored: Scored, model: TaskModel, *, split: str | None) -> dict[str, Any]:
    """One number, and all that it rests on."""
    low, high = interval(scored)
    return {
        "metric": scored.metric,
        "value": scored.value,
        "interval": [low, high],
        "n": scored.n,
        "split": split,
        "weights": model.digest,
        "bytes": model.num_bytes,
        "notes": list(scored.notes),
        "others": [score_record(other, model, split=split) for other in scored.others],
    }


def means(records: dict[str, Any]) -> dict[str, float | None]:
    """Over tasks; None where one of them has none."""

    def mean(key: str) -> float | None:
        values = [record[key] for record in records.values()]
        return float(np.mean(values)) if values and None not in values else None

    return {key: mean(key) for key in ("merged", "fine_tuned", "base", "normalised")}
