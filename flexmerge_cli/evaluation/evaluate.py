"""Scores every task of a bundle on its own view, and beside it the fine-tuned model and the base.

`flexmerge.eval/1`, one JSON document:
spec   {path, sha256, not_scored} of eval.yaml
gate   present if there are limits: {outcome, message, tasks: {name: {outcome, message, limit, drop, low, high, n,
       n_needed}}, not_scored, forgotten}; the last two list tasks that the spec excludes, and that it does not name
tasks  {name: {kind, metric, higher_is_better, n, data, merged, fine_tuned, base, normalised, …_interval, scores}};
       data is the digest of the examples;
       scores {merged, fine_tuned, base: {value, n, interval, split, metric, weights, bytes, notes, others}}
mean   means of merged, fine-tuned, base and normalised scores; null if a task lacks one, or metrics differ
unseen, unseen_mean  the same of data of tasks that were not merged, if the spec has such, each with its `head`
corrupted  the same with each corruption that was asked for: {gaussian_noise@3: {tasks, mean}}
cross  present if requested: {task of the model: {task of the data: {merged, fine_tuned: {value, …}}}}, without its own
       data, whose scores are under `tasks`; {mismatch, reason} if the model's head does not fit the data
bundle, methods, num_models, one_model_bytes   the id of the bundle, if there is one, its methods, and its models
stored_bytes, total_bytes, factor   its size: bytes of tensors, bytes of all files, and in models
evaluations  {computed, repeated, cached}: models that were run, scores reused from this run, scores found in the cache
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.evaluation.cross import WHOS, mismatches
from flexmerge_cli.evaluation.intervals import interval
from flexmerge_cli.evaluation.kinds.corruption import Corruption
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT
from flexmerge_cli.evaluation.metrics import normalised
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.references import References, spec_references
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer, no_reference
from flexmerge_cli.evaluation.spec import EvalSpec

FORMAT = "flexmerge.eval/1"
OnStep = Callable[[str, int, int], None]
"""Progress: (which model of which task, examples done, examples in all)."""
OnScored = Callable[[str, dict[str, TaskModel], dict[str, Scored]], None]
"""Callback (task, its models, their outputs), keyed by `merged`, `fine_tuned`, `base`; also of unseen tasks that a gate
counts."""


def evaluate(
    bundle: Bundle | None,
    spec: EvalSpec,
    *,
    scorer: Scorer | None = None,
    references: References | None = None,
    tasks: Sequence[str] | None = None,
    cross: bool = False,
    on_step: OnStep = lambda *_step: None,
    on_scored: OnScored = lambda *_scored: None,
) -> dict[str, Any]:
    """Score every task; without a bundle, only the references. One model is in memory at a time.

    references: by default those that the spec names. tasks: those whose models are scored, by default all of the spec.
    cross: also score merged and fine-tuned models on the data of the spec's other tasks.
    Raises UsageError, before a weight is read, if spec, data and side files do not fit together, DataError if weights
    do not fit, and IntegrityError if a file that a scored task reads differs from the manifest; then a cached score
    does not count either.
    """
    scorer = scorer or Scorer(spec=spec)
    if references is None:
        references = spec_references(spec, bundle) if bundle is not None else References()
    folders = {task: bundle.config_folder(task) for task in spec.tasks} if bundle is not None else references.folders
    tasks = list(spec.tasks) if tasks is None else tasks
    for task in tasks:
        if bundle is not None:
            bundle.check_files(task, weights=False)  # the examples are made from these
        for name in (task, *spec.others_of(task)):
            examples = scorer.examples(name, folders[task])
            if examples.metrics == (AGREEMENT,) and "fine_tuned" not in references.of(task):
                raise no_reference(spec.place(name, folders[task]))
    others = {task: mismatches(scorer, task, folders) for task in tasks} if cross else {}
    if bundle is not None:
        for task in tasks:
            bundle.check_files(task)  # for all tasks before the first is scored, which may take long
    records, further, crossed = {}, {}, {}
    for task in tasks:
        models, scored = _score_task(bundle, spec, task, scorer, references, folders[task], on_step)
        for name in spec.others_of(task):
            its = {who: replace(model, task=name) for who, model in models.items()}
            found = _scores_of(scorer, its, f"{task}, {{}}, on {name}", on_step)
            data = scorer.examples(name, folders[task]).digest
            further[name] = task_record(spec, name, its, found, data=data)
            if spec.entry(name).gate:
                on_scored(name, its, found)
        if cross:
            crossed[task] = {
                other: _cross_record(scorer, models, other, on_step)
                if why is None
                else {"mismatch": why.word, "reason": why.reason}
                for other, why in others[task].items()
            }
        if bundle is not None:
            bundle.check_files(task)  # config and tokenizer were read by path: nothing was replaced meanwhile
        on_scored(task, models, scored)
        data = scorer.examples(task, folders[task]).digest
        records[task] = task_record(spec, task, models, scored, data=data)
    document: dict[str, Any] = {"format": FORMAT, "spec": spec.record, "tasks": records, "mean": means(records)}
    document["evaluations"] = scorer.counts
    document |= on_further_data(spec, further)
    if cross:
        document["cross"] = crossed
    if bundle is None:
        return document
    return document | {
        "bundle": bundle.manifest.id,
        "methods": bundle.methods,
        "num_models": len(bundle.tasks),
        "one_model_bytes": bundle.manifest.one_model_bytes,
        "stored_bytes": bundle.manifest.stored_bytes,
        "total_bytes": bundle.total_bytes,
        "factor": bundle.manifest.stored_bytes / max(1, bundle.manifest.one_model_bytes),
    }


def on_further_data(spec: EvalSpec, records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the keys `unseen`, `unseen_mean` and `corrupted` of the document. records: by their names in the spec."""
    found: dict[str, Any] = {}
    if spec.unseen:
        unseen = {name: {"head": task.head} | records[name] for name, task in spec.unseen.items() if name in records}
        found |= {"unseen": unseen, "unseen_mean": means(unseen)}
    if spec.corruptions:
        found["corrupted"] = {str(corruption): _corrupted(spec, records, corruption) for corruption in spec.corruptions}
    return found


def _corrupted(spec: EvalSpec, records: Mapping[str, dict[str, Any]], corruption: Corruption) -> dict[str, Any]:
    names = {task: f"{task} {corruption}" for task in spec.tasks}
    tasks = {task: records[name] for task, name in names.items() if name in records}
    return {"tasks": tasks, "mean": means(tasks)}


def format_counts(counts: Mapping[str, int]) -> str:
    """Say in one line where the scores of a document came from. counts: its `evaluations`."""
    return (
        f"{counts['computed']:,} run, {counts['repeated']:,} reused from this run, {counts['cached']:,} from the cache"
    )


def format_methods(document: Mapping[str, Any]) -> str:
    """List the methods that merged a bundle, in one line."""
    return "; ".join(document["methods"]) or "copies"


def _score_task(
    bundle: Bundle | None,
    spec: EvalSpec,
    task: str,
    scorer: Scorer,
    references: References,
    folder: Path,
    on_step: OnStep,
) -> tuple[dict[str, TaskModel], dict[str, Scored]]:
    openers = dict(references.of(task))
    if bundle is not None:
        openers = {"merged": lambda: bundle_model(bundle, task)} | openers
    if not openers:
        raise spec.place(task, folder).error("", "no model to score", hint="checkpoint: path/of/the/fine-tuned/model")
    fine_tuned = openers["fine_tuned"]() if "fine_tuned" in openers else None
    models, found = {}, {}
    for who, opened in openers.items():
        model = fine_tuned if who == "fine_tuned" and fine_tuned is not None else opened()
        # The side files are copies of the task's own, so the examples are prepared with them once.
        model = replace(model, folder=folder)

        def on_example(done: int, total: int, who: str = who) -> None:
            on_step(f"{task}, {who.replace('_', '-')}", done, total)

        on_example(0, scorer.examples(task, folder).n)
        models[who], found[who] = model, scorer.score(model, reference=fine_tuned, on_example=on_example)
    return models, found


def _cross_record(scorer: Scorer, models: Mapping[str, TaskModel], other: str, on_step: OnStep) -> dict[str, Any]:
    """Return the scores of a task's models on another task's data."""
    its = {who: replace(models[who], task=other) for who in WHOS if who in models}
    step = f"{next(iter(models.values())).task}, {{}}, on {other}"
    source = scorer.spec.tasks[other].data_spec
    return {
        who: score_record(scored, its[who], split=source.split if source else None)
        for who, scored in _scores_of(scorer, its, step, on_step).items()
    }


def _scores_of(scorer: Scorer, models: Mapping[str, TaskModel], step: str, on_step: OnStep) -> dict[str, Scored]:
    """Return the outputs of models that are open. step: the progress of each, with {} for the name of the model."""
    reference = models.get("fine_tuned")
    return {
        who: scorer.score(model, reference=reference, on_example=partial(on_step, step.format(who.replace("_", "-"))))
        for who, model in models.items()
    }


def task_record(
    spec: EvalSpec, task: str, models: dict[str, TaskModel], found: dict[str, Scored], *, data: str | None
) -> dict[str, Any]:
    """Make the report on one task. models, found: keyed by `merged`, `fine_tuned` and `base`.

    data: the digest of its examples; empty if external code or a harness provides them.
    """
    source = spec.entry(task).data_spec
    scores = {
        who: score_record(scored, models[who], split=source.split if source else None) for who, scored in found.items()
    }
    first = next(iter(found.values()))
    record: dict[str, Any] = {
        "kind": spec.entry(task).kind,
        "metric": first.metric,
        "higher_is_better": first.higher_is_better,
        "n": first.n,
        "data": data or None,
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
    """Record one number with its evidence."""
    ends = interval(scored)
    return {
        "metric": scored.metric,
        "value": scored.value if isfinite(scored.value) else None,  # JSON has no infinity, which a perplexity may be
        "interval": list(ends) if all(map(isfinite, ends)) else None,
        "n": scored.n,
        "split": split,
        "weights": model.digest,
        "bytes": model.num_bytes,
        "notes": list(scored.notes),
        "others": [score_record(other, model, split=split) for other in scored.others],
    }


def one_metric(records: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the metric of all tasks; None if they differ, so that only normalised scores can be averaged."""
    metrics = {record["metric"] for record in records.values()}
    return metrics.pop() if len(metrics) == 1 else None


def means(records: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Average over tasks. None if one of them has no value, or metrics differ."""

    def mean(key: str) -> float | None:
        values = [record[key] for record in records.values()]
        return float(np.mean(values)) if values and None not in values else None

    one = one_metric(records) is not None
    return {key: mean(key) if one else None for key in ("merged", "fine_tuned", "base")} | {
        "normalised": mean("normalised")
    }
