"""`eval --tune`: one argument of methods chosen on validation data, which are never those reported.

Every method that takes the argument is drawn with each value at every size; the value with the best mean over sizes and
tasks is the method's own, of equals the one nearest to the default. Methods that do not take it, or say it themselves,
stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np

from flexmerge_cli.allocation.auto_options import parse_auto
from flexmerge_cli.allocation.plan_file import Plan
from flexmerge_cli.curve import CurveRequest, draw
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.curve import OnScore, Point
from flexmerge_cli.evaluation.metrics import normalised
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.methods.registry import parse_call, resolve, split_call

MAX_VALUES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Tune:
    """An argument and the values that are tried."""

    name: str
    values: tuple[str, ...]


def parse_tune(text: str) -> Tune:
    """`scale=0.5:2.5:0.25` (both ends), or `scale=1,1.5,2`. Raises UsageError."""
    name, equals, rest = text.partition("=")
    hint = "--tune scale=0.5:2.5:0.25, or scale=1,1.5,2"
    if not equals or not name.strip() or not rest.strip():
        raise UsageError(f"--tune `{text}` is not ARGUMENT=VALUES", hint=hint)
    if ":" not in rest:
        values = tuple(dict.fromkeys(value.strip() for value in rest.split(",") if value.strip()))
    else:
        try:
            first, last, step = (Decimal(end.strip()) for end in rest.split(":"))
        except (ValueError, InvalidOperation):
            raise UsageError(f"--tune `{text}`: `{rest}` is no range", hint=hint) from None
        if not all(number.is_finite() for number in (first, last, step)) or step <= 0 or last < first:
            raise UsageError(f"--tune `{text}`: `{rest}` is no range", hint=hint)
        count = int((last - first) / step) + 1
        values = tuple(f"{first + number * step:f}" for number in range(min(count, MAX_VALUES + 1)))
    if not 2 <= len(values) <= MAX_VALUES:
        raise UsageError(f"--tune `{text}` has {len(values)} values", hint=f"between 2 and {MAX_VALUES}")
    return Tune(name=name.strip(), values=values)


def variants(methods: Sequence[str], tune: Tune) -> dict[str, dict[str, str]]:
    """Method -> value -> the method with it; of those that take the argument. Raises UsageError if none does."""
    found = {}
    for method in methods:
        if parse_auto(method) is not None:
            continue
        text = resolve(method).method
        if tune.name not in parse_call(text, run_files=True).method.parameters or tune.name in split_call(text)[1]:
            continue
        join = "," if ":" in method else ":"
        found[method] = {value: f"{method}{join}{tune.name}={value}" for value in tune.values}
        for variant in found[method].values():
            parse_call(resolve(variant).method, run_files=True)
    if not found:
        raise UsageError(
            f"no method asked for takes `{tune.name}`, or all say it themselves", hint="flexmerge methods NAME"
        )
    return found


def tuned(
    plan: Plan, plan_path: Path, spec: EvalSpec, request: CurveRequest, tune: Tune, *, on_score: OnScore
) -> dict[str, str]:
    """Method -> itself with the value that is best on the spec's data."""
    candidates = variants(request.methods, tune)
    tried = tuple(variant for by_value in candidates.values() for variant in by_value.values())
    curve = draw(plan, plan_path, spec, replace(request, methods=tried, alternatives=False), on_score=on_score)
    means = {variant: _mean([p for p in curve.points if p.method == variant], curve.fine_tuned) for variant in tried}
    chosen = {}
    for method, by_value in candidates.items():
        default = parse_call(resolve(method).method, run_files=True).args[tune.name]
        chosen[method] = max(by_value.values(), key=lambda v: (means[v], -_far(v, default)))
    return chosen


def _mean(points: Sequence[Point], references: dict[str, Scored]) -> float:
    """Over sizes and tasks; parts of the fine-tuned score, so that tasks and metrics count alike."""
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
