"""Scores a bundle whose router chooses the task of each example: `eval --router`.

An example that goes to its own task counts as that task's model answers it. One that goes to another task is right only
if that model's head has the same labels and chooses the right one. Labels such as LABEL_0 name nothing and
are not the same.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.router import Router
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.cross import mismatches
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.router import FeatureModel, OnStep, examples_for_router
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.scoring import Scorer

METRIC = "accuracy"


def require_routable(bundle: Bundle, scorer: Scorer) -> None:
    """Raise UsageError unless the spec has exactly the tasks that the router tells apart, all scored by accuracy."""
    Router.of(bundle)
    assert bundle.manifest.router is not None
    known, spec = set(bundle.manifest.router.tasks), scorer.spec
    if differ := sorted(known ^ set(spec.tasks)):
        said = f"the router tells {len(known)} tasks apart, and the spec has others: {', '.join(differ)}"
        raise UsageError(said, hint="make a router of these tasks with `flexmerge route`, or change the spec")
    for task in spec.tasks:
        side = bundle.config_folder(task)
        if METRIC not in scorer.examples(task, side).metrics:
            raise spec.place(task, side).error(
                "metric", f"--router needs {METRIC} as a metric of every task", hint=f"metric: {METRIC}"
            )


def routed_record(
    bundle: Bundle, scorer: Scorer, merged: Mapping[str, Scored], on_step: OnStep = lambda *_step: None
) -> dict[str, Any]:
    """Return the record `router` of `flexmerge.eval/1`. merged: the scores of the merged models on their own data.

    Raises what `require_routable` and the scorer raise.
    """
    require_routable(bundle, scorer)
    router, entry, spec = Router.of(bundle), bundle.manifest.router, scorer.spec
    assert entry is not None
    first = entry.tasks[0]
    model = FeatureModel.of(bundle, entry.features, replace(scorer.run(first), dtype=None))  # as `predict` does
    records, seconds, count = {}, 0.0, 0
    for task in spec.tasks:
        examples = examples_for_router(bundle, spec, task, entry.features, limit=None, access=scorer.access)
        on_step(f"features of {task}", 0, examples.n)
        start = time.perf_counter()
        chosen = router.probabilities(model.features(spec, examples, task)).argmax(axis=1)
        seconds, count = seconds + time.perf_counter() - start, count + examples.n
        hits = _hits(bundle, scorer, task, merged[task], entry.tasks)
        own = entry.tasks.index(task)
        records[task] = {
            "n": examples.n,
            "routed_right": float((chosen == own).mean()),
            "true": float(hits[own].mean()),
            "routed": float(hits[chosen, np.arange(examples.n)].mean()),
            "random": float(hits.mean()),
            "to": {name: int((chosen == number).sum()) for number, name in enumerate(entry.tasks)},
        }
    keys = ("routed_right", "true", "routed", "random")
    return {
        "kind": entry.kind,
        "features": entry.features,
        "metric": METRIC,
        "tasks": records,
        "mean": {key: float(np.mean([record[key] for record in records.values()])) for key in keys},
        "seconds_per_example": seconds / max(1, count),
    }


def _hits(bundle: Bundle, scorer: Scorer, task: str, own: Scored, tasks: tuple[str, ...]) -> np.ndarray:
    """Return whether the model of each task is right on each of a task's examples, bool [tasks, n]."""
    folders = {name: bundle.config_folder(name) for name in tasks}
    found = np.zeros((len(tasks), own.n), bool)
    for number, name in enumerate(tasks):
        if name == task:
            scored = own
        elif mismatches(scorer, name, folders, named=True)[task] is None:
            scored = scorer.score(_on_data_of(bundle, name, task))
        else:
            continue
        one = next(one for one in (scored, *scored.others) if one.metric == METRIC)
        found[number] = one.predictions == one.labels
    return found


def _on_data_of(bundle: Bundle, name: str, task: str) -> Any:
    return replace(bundle_model(bundle, name), task=task)
