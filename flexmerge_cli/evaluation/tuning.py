"""Chooses an argument of methods on validation data, which are never the data that are reported.

Every method that takes the argument is scored with each value at every size. The value with the best mean over sizes
and tasks is chosen; among equals, the one nearest to the default. Methods that do not take the argument, or set it
themselves, are left unchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexmerge_cli.evaluation.curve import OnScore, Point
from flexmerge_cli.evaluation.drawing import draw
from flexmerge_cli.evaluation.metrics import normalised
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.request.choices import Clusters, Cut
from flexmerge_cli.request.curve import CurveMethod, CurveRequest, Tune


def tuned(
    plan: Plan, plan_path: Path, spec: EvalSpec, request: CurveRequest, tune: Tune, *, on_score: OnScore
) -> dict[str, CurveMethod]:
    """Map each method's name to the method with the value that is best on the spec's data."""
    tried = tuple(variant for by_value in tune.variants.values() for variant in by_value.values())
    curve = draw(plan, plan_path, spec, replace(request, methods=tried, alternatives=False), on_score=on_score)
    means = {
        method.name: _mean([point for point in curve.points if point.method == method.name], curve.fine_tuned)
        for method in tried
    }
    chosen = {}
    for method in request.methods:
        by_value = tune.variants.get(method.name)
        if by_value:
            assert isinstance(method.request.choice, Cut | Clusters)
            default = method.request.choice.use.call.args[tune.name]
            chosen[method.name] = max(by_value.values(), key=lambda v: (means[v.name], -_far(v.name, default)))
    return chosen


def _mean(points: Sequence[Point], references: dict[str, Scored]) -> float:
    """Average normalised scores over sizes and tasks, so that tasks and metrics count equally."""
    parts = [
        normalised(scored.value, references[task].value, higher_is_better=scored.higher_is_better) or 0.0
        for point in points
        for task, scored in point.scores.items()
    ]
    return float(np.mean(parts)) if parts else float("-inf")


def _far(variant: str, default: object) -> float:
    try:
        return abs(float(variant.rpartition("=")[2]) - float(str(default)))
    except ValueError:
        return 0.0
