"""What is told of a curve: `flexmerge.eval/1` with `points`, one JSON document. As CSV: tidy.py.

plan, one_model_bytes     of the plan, and the bytes that a factor counts in
tasks         {name: {kind, metric, higher_is_better, n, fine_tuned, base, …_interval, scores}}: the references
points        [{method, sizes, bytes, total_bytes, factor, merges, undone, command, tasks, mean}], by method and bytes;
              `sizes` that were asked for and came to this point, none where it is the method's own;
              tasks {name: {value, interval, normalised, weights}}; mean {value, interval, normalised}
alternatives  the same of copies in fewer bits: `method` is their name
unreached     [{method, size, message}]
evaluations   {asked, scored, saved}
order         [{block, position, similarity}] of the blocks, in forward order: mean place of their merges in the order,
              0 first and 1 last
gate          with limits: {outcome, message, command, tasks}, of each point and of the smallest that passes
data_dependent   {arguments, spec} of arguments that were chosen on data; null where none were
An interval is of 95 %; that of a mean adds the squares of its tasks' half widths, which are independent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexmerge_cli.allocation.plan_file import Plan
from flexmerge_cli.evaluation.curve import Curve, Point
from flexmerge_cli.evaluation.evaluate import FORMAT, means, task_record
from flexmerge_cli.evaluation.gate import Gate, Outcome, judge
from flexmerge_cli.evaluation.intervals import interval
from flexmerge_cli.evaluation.metrics import normalised
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.spec import EvalSpec

Interval = tuple[float, float]


def curve_record(
    plan: Plan,
    spec: EvalSpec,
    curve: Curve,
    *,
    gate: Gate | None = None,
    data_dependent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document."""
    tasks = {
        task: task_record(
            spec, task, dict(curve.models[task]), {"fine_tuned": curve.fine_tuned[task], "base": curve.base[task]}
        )
        for task in spec.tasks
    }
    seen: dict[tuple[str, str], Interval] = {}
    points = [_point(plan, point, curve.fine_tuned, seen) for point in curve.points]
    if gate:
        for point, record in zip(curve.points, points):
            record["gate"] = judge(point.scores, curve.fine_tuned, gate, same_as_fine_tuned(point, curve)).record()
    return {
        "format": FORMAT,
        "plan": plan.sha256,
        "one_model_bytes": plan.one_model_bytes,
        "num_models": len(plan.tasks),
        "tasks": tasks,
        "mean": means(tasks),
        "points": points,
        "alternatives": [_point(plan, point, curve.fine_tuned, seen) for point in curve.alternatives],
        "unreached": [{"method": u.method, "size": u.size, "message": u.message} for u in curve.unreached],
        "evaluations": {
            "asked": curve.num_evaluations,
            "scored": curve.num_scored,
            "saved": curve.num_evaluations - curve.num_scored,
        },
        "order": _order(plan),
        "data_dependent": dict(data_dependent) if data_dependent else None,
    } | ({"gate": _smallest_that_passes(points)} if gate else {})


def same_as_fine_tuned(point: Point, curve: Curve) -> dict[str, bool]:
    """By task: whether its weights are the fine-tuned model's."""
    return {task: digest == curve.models[task]["fine_tuned"].digest for task, digest in point.digests.items()}


def _smallest_that_passes(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The gate of a curve: that some point of it passes. Else the tasks of the one that is nearest to it."""
    if not points:
        return {"outcome": str(Outcome.FAIL), "message": "no method reaches a size", "command": None, "tasks": {}}
    by_size = sorted(points, key=lambda point: (point["bytes"], point["total_bytes"]))
    passing = [point for point in by_size if point["gate"]["outcome"] == Outcome.PASS]
    if passing:
        told = (
            f"pass: {passing[0]['method']} at {passing[0]['factor']:.4f}x is the smallest of {len(passing)} that pass"
        )
        return passing[0]["gate"] | {"message": told, "command": passing[0]["command"]}
    nearest = min(by_size, key=lambda point: sum(t["outcome"] != Outcome.PASS for t in point["gate"]["tasks"].values()))
    told = f"none passes; {nearest['method']} at {nearest['factor']:.4f}x is nearest: {nearest['gate']['message']}"
    return nearest["gate"] | {"message": told, "command": nearest["command"]}


def _point(
    plan: Plan, point: Point, references: Mapping[str, Scored], seen: dict[tuple[str, str], Interval]
) -> dict[str, Any]:
    """seen: intervals of (task, weights), which are resampled once."""
    tasks = {}
    for task, scored in point.scores.items():
        key = (task, point.digests[task])
        if key not in seen:
            seen[key] = interval(scored)
        tasks[task] = {
            "value": scored.value,
            "interval": list(seen[key]),
            "normalised": normalised(scored.value, references[task].value, higher_is_better=scored.higher_is_better),
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
        "mean": mean_of(tasks),
    }


def mean_of(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Over tasks: value, its interval, and the part of the fine-tuned score, null where a task has none."""
    values = np.array([record["value"] for record in tasks.values()])
    ends = np.array([record["interval"] for record in tasks.values()])
    low, high = np.sqrt(((ends - values[:, None]) ** 2).sum(0)) / len(values)
    parts = [record["normalised"] for record in tasks.values()]
    mean = float(values.mean())
    return {
        "value": mean,
        "interval": [mean - float(low), mean + float(high)],
        "normalised": float(np.mean(parts)) if None not in parts else None,
    }


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
