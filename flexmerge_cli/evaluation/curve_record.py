"""Makes the document of a curve: `flexmerge.eval/1` with `points`, as JSON. tidy.py writes it as CSV.

plan, one_model_bytes     the path of the plan, and the bytes of one model, the unit of factors
tasks         {name: {kind, metric, higher_is_better, n, fine_tuned, base, …_interval, scores}}: the references
points        [{method, sizes, bytes, total_bytes, factor, merges, undone, command, tasks, mean}], by method and bytes;
              `sizes` are those requested that lead to this point, empty if it is at the method's own size;
              tasks {name: {value, interval, normalised, weights}}; mean {value, interval, normalised}
mean, mean_of  means of the references, and what they average: the metric, or `normalised` if tasks have different ones
alternatives  points of copies in fewer bits, whose name is `method`
ensembles     present if requested: [{rule, of, bytes, factor, passes, tasks, mean}] of fine-tuned models with the same
              labels, `of` being their tasks and `passes` the models that run on an example; tasks and mean as of points
plane         present if requested: {tasks: [A, B], places, points: [{a, b, tasks, mean}]} of θ_0 + a·τ_A + b·τ_B
unreached     [{method, size, message}]
evaluations   {asked, computed, repeated, cached}: points times tasks, models that were run, scores of this run reused,
              and scores found in the cache
order         [{block, position, similarity}] for every block, in forward order. position is the mean place of its
              merges in the order, from 0 (first) to 1 (last)
spec          {path, sha256, not_scored}: the file of the spec
gate          present if there are limits: {outcome, message, command, tasks, not_scored, forgotten}, for each point and
              for the smallest that passes
data_dependent   {arguments, spec}: arguments that were chosen on data; null if none were
Intervals cover 95 %. Tasks are independent, so the half width of a mean is the root of the sum of their squares.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmerge_cli.evaluation.evaluate import FORMAT, means, one_metric, task_record
from flexmerge_cli.evaluation.gate import Gate, Outcome, judge
from flexmerge_cli.evaluation.intervals import interval
from flexmerge_cli.evaluation.metrics import normalised
from flexmerge_cli.evaluation.plane import PLACES
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.formats.plan_file import Plan

if TYPE_CHECKING:
    from flexmerge_cli.evaluation.curve import Curve, Point

Interval = tuple[float, float]
NORMALISED = "normalised"


def curve_record(
    plan: Plan,
    spec: EvalSpec,
    curve: "Curve",
    *,
    gate: Gate | None = None,
    data_dependent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the document."""
    tasks = {
        task: task_record(
            spec,
            task,
            dict(curve.models[task]),
            {"fine_tuned": curve.fine_tuned[task], "base": curve.base[task]},
            data=curve.data.get(task),
        )
        for task in spec.tasks
    }
    seen: dict[tuple[str, str], Interval] = {}
    points = [_point(plan, point, curve.fine_tuned, tasks, seen) for point in curve.points]
    if gate:
        for point, record in zip(curve.points, points):
            same = same_as_fine_tuned(point, curve)
            record["gate"] = judge(
                point.scores, curve.fine_tuned, gate, same, not_scored=spec.not_scored, forgotten=spec.forgotten
            ).record()
    return (
        {
            "format": FORMAT,
            "plan": plan.sha256,
            "spec": spec.record,
            "one_model_bytes": plan.one_model_bytes,
            "num_models": len(plan.tasks),
            "tasks": tasks,
            "mean": means(tasks) | reference_means(tasks),
            "mean_of": one_metric(tasks) or NORMALISED,
            "points": points,
            "alternatives": [_point(plan, point, curve.fine_tuned, tasks, seen) for point in curve.alternatives],
            "unreached": [{"method": u.method, "size": u.size, "message": u.message} for u in curve.unreached],
            "evaluations": curve.counts,
            "order": _order(plan),
            "data_dependent": dict(data_dependent) if data_dependent else None,
        }
        | ensemble_records(plan, curve, tasks)
        | plane_record(curve, tasks)
        | ({"gate": _smallest_that_passes(spec, points)} if gate else {})
    )


def ensemble_records(plan: Plan, curve: "Curve", records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Make the key `ensembles`, if they were requested."""
    if curve.ensembles is None:
        return {}
    found = []
    for ensemble in curve.ensembles:
        tasks = {
            task: _score(scored, curve.fine_tuned[task], interval(scored)) for task, scored in ensemble.scores.items()
        }
        found.append(
            {
                "rule": ensemble.rule, "of": list(tasks), "bytes": ensemble.num_bytes, "passes": len(tasks),
                "factor": ensemble.num_bytes / max(1, plan.one_model_bytes), "tasks": tasks,
                "mean": mean_of(tasks, {task: records[task] for task in tasks}),
            }
        )  # fmt: skip
    return {"ensembles": found}


def plane_record(curve: "Curve", records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Make the key `plane`, if it was requested."""
    if curve.plane is None:
        return {}
    points = []
    for (a, b), scores in curve.plane.scores.items():
        tasks = {task: _score(scored, curve.fine_tuned[task], interval(scored)) for task, scored in scores.items()}
        mean = mean_of(tasks, {task: records[task] for task in tasks})
        points.append({"a": a, "b": b, "tasks": tasks, "mean": mean})
    return {"plane": {"tasks": list(curve.plane.tasks), "places": list(PLACES), "points": points}}


def _score(scored: Scored, reference: Scored, ends: Interval) -> dict[str, Any]:
    """Make the record of one number of a point, beside the fine-tuned model's."""
    return {
        "value": scored.value if _finite(scored.value) else None,
        "interval": list(ends) if _finite(scored.value, *ends) else None,
        "normalised": normalised(scored.value, reference.value, higher_is_better=scored.higher_is_better),
    }


def same_as_fine_tuned(point: "Point", curve: "Curve") -> dict[str, bool]:
    """Map each task to whether its weights are those of the fine-tuned model."""
    return {task: digest == curve.models[task]["fine_tuned"].digest for task, digest in point.digests.items()}


def _smallest_that_passes(spec: EvalSpec, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Judge a curve, which passes if some point does. If none does, list the tasks of the nearest point."""
    if not points:
        return {
            "outcome": str(Outcome.FAIL), "message": "no method reaches a size", "command": None, "tasks": {},
            "not_scored": list(spec.not_scored), "forgotten": list(spec.forgotten),
        }  # fmt: skip
    by_size = sorted(points, key=lambda point: (point["bytes"], point["total_bytes"]))
    passing = [point for point in by_size if point["gate"]["outcome"] == Outcome.PASS]
    if passing:
        message = (
            f"pass: {passing[0]['method']} at {passing[0]['factor']:.4f}x is the smallest of {len(passing)} that pass"
        )
        return {**passing[0]["gate"], "message": message, "command": passing[0]["command"]}
    nearest = min(by_size, key=lambda point: sum(t["outcome"] != Outcome.PASS for t in point["gate"]["tasks"].values()))
    message = f"none passes; {nearest['method']} at {nearest['factor']:.4f}x is nearest: {nearest['gate']['message']}"
    return {**nearest["gate"], "message": message, "command": nearest["command"]}


def _point(
    plan: Plan,
    point: "Point",
    references: Mapping[str, Scored],
    records: Mapping[str, Mapping[str, Any]],
    seen: dict[tuple[str, str], Interval],
) -> dict[str, Any]:
    """Make the record of a point. seen: intervals by (task, weights), so that each is resampled once."""
    tasks = {}
    for task, scored in point.scores.items():
        key = (task, point.digests[task])
        if key not in seen:
            seen[key] = interval(scored)
        tasks[task] = _score(scored, references[task], seen[key]) | {
            "weights": point.digests[task],
            "notes": list(scored.notes),
        }
    return {
        "method": point.method,
        "sizes": list(point.sizes),
        "bytes": point.tensor_bytes,
        "total_bytes": point.total_bytes,
        "factor": point.tensor_bytes / max(1, plan.one_model_bytes),
        "merges": point.merges,
        "undone": point.undone,
        "command": point.command,
        "tasks": tasks,
        "mean": mean_of(tasks, records),
    }


def mean_of(tasks: Mapping[str, Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Average the values over tasks, with an interval, and the normalised scores; null if a task lacks one.

    If metrics differ, the value averages normalised scores, and a missing one counts as 0. references: `task_record`s.
    """
    triples = [(record["value"], *(record["interval"] or (None, None))) for record in tasks.values()]
    if one_metric(references) is None:
        in_parts = [[_part(one, references[task]) for one in triple] for task, triple in zip(tasks, triples)]
        triples = [(value, min(low, high), max(low, high)) for value, low, high in in_parts]
    parts = [record["normalised"] for record in tasks.values()]
    kept = float(np.mean(parts)) if None not in parts else None
    if any(None in triple for triple in triples):
        return {"value": None, "interval": None, "normalised": kept}
    values, ends = np.split(np.array(triples), [1], axis=1)
    low, high = np.sqrt(((ends - values) ** 2).sum(0)) / len(values)
    mean = float(values.mean())
    return {"value": mean, "interval": [mean - float(low), mean + float(high)], "normalised": kept}


def reference_means(records: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Average the scores of the fine-tuned models and of the base, in the unit of `mean_of`."""
    if one_metric(records) is not None:
        return {who: means(records)[who] for who in ("fine_tuned", "base")}
    return {
        who: float(np.mean([_part(record[who], record) for record in records.values()]))
        if all(record[who] is not None and record["fine_tuned"] is not None for record in records.values())
        else None
        for who in ("fine_tuned", "base")
    }


def _part(value: float | None, reference: Mapping[str, Any]) -> float:
    best = reference["fine_tuned"]
    if value is None or best is None:
        return 0.0
    return normalised(value, best, higher_is_better=reference["higher_is_better"]) or 0.0


def _finite(*values: float) -> bool:
    """Return whether JSON can hold the values: a perplexity that overflows is infinite."""
    return all(map(math.isfinite, values))


def _order(plan: Plan) -> list[dict[str, Any]]:
    merges = plan.merges()
    found = []
    for index, block in enumerate(plan.blocks):
        places = [place for place, merge in enumerate(merges) if merge.block == index]
        found.append(
            {
                "block": block.name,
                "position": float(np.mean(places)) / max(1, len(merges) - 1) if places else None,
                "similarity": float(np.mean([merges[place].similarity for place in places])) if places else None,
            }
        )
    return found
