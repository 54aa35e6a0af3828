"""Makes the document of a curve from a request in words, with the results of --tune and --choose.

Everything that can be refused is refused before a weight is read. drawing.py scores the points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.choose import ChosenPoint, choose, halves
from flexmerge_cli.evaluation.curve import Curve, OnScore, Point
from flexmerge_cli.evaluation.curve_record import curve_record
from flexmerge_cli.evaluation.drawing import draw
from flexmerge_cli.evaluation.gate import Gate, require_scored
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec
from flexmerge_cli.evaluation.tune import require_other_data
from flexmerge_cli.evaluation.tuning import tuned
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.request.curve import CurveRequest, curve_methods, parse_plane, parse_tune
from flexmerge_cli.request.size import parse_sizes

DEFAULT_METHODS = "task_arithmetic"


def curve_document(
    plan_path: Path,
    spec_path: Path,
    *,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    sizes: str | None = None,
    words: Mapping[str, Any],
    gate: Gate | None = None,
    target: float | None = None,
    tune: str | None = None,
    tune_spec_path: Path | None = None,
    plane: str | None = None,
    allow_exec: bool = False,
    on_score: OnScore = lambda *_step: None,
    **run: Any,
) -> dict[str, Any]:
    """Score a plan's tasks by every method at every size. Writes nothing.

    plan_path: the path that commands in the document give; relative sources are relative to its folder.
    words: steps, calibrate, method_for, fit, cluster, seed and dtype of `merge_request`, for every method. target: the
    fraction of the fine-tuned score that --choose must keep, in (0, 2]. plane: `A,B`. run: the fields relocate, access,
    reuse, ensembles, parallel, device, threads and max_memory of CurveRequest.
    Raises UsageError and GateError before a weight is read, SourceError, DataError.
    """
    gate = gate or Gate()
    plan = load_plan(plan_path)
    if not plan.task_names:
        raise UsageError(
            f"{plan_path} has no task that merges: adapters that are kept have no curve",
            hint=f"flexmerge merge {plan_path} -o bundle/, and flexmerge eval bundle/ --spec {spec_path}",
        )

    def read(path: Path) -> EvalSpec:
        return read_spec(path, plan.task_names, unscorable=plan.kept_names, allow_exec=allow_exec)

    spec = read(spec_path)
    if target is not None:
        require_scored(spec, f"--choose judges all tasks of a bundle: {spec_path}")
        if not 0 < target <= 2:
            raise UsageError(f"--choose {target} is not a part of the fine-tuned score", hint="--choose 0.99")
    asked = CurveRequest(
        methods=curve_methods(methods, has_statistics=plan.settings.statistics == "all", **words),
        sizes=parse_sizes(sizes) if sizes is not None else (),
        plane=parse_plane(plane) if plane is not None else None,
        **run,
    )
    for size in asked.sizes:
        plan.target(size)
    unknown = [task for task in asked.plane or () if task not in spec.tasks]
    if unknown:
        raise UsageError(f"--plane: the spec has no task `{unknown[0]}`", hint=f"two of: {', '.join(spec.tasks)}")
    tune_spec = None
    if tune_spec_path is not None:
        if target is None and tune is None:
            raise UsageError("--tune-spec needs --choose or --tune", hint="--choose 0.99, or --tune scale=1,2")
        tune_spec = read(tune_spec_path)
        require_other_data(tune_spec, spec)
        tune_spec = tune_spec.only(*spec.tasks)  # the methods that are not reported play no part in the choice
    data_dependent = None
    if tune is not None:
        if tune_spec is None:
            raise UsageError(
                "--tune needs data other than those reported", hint="--tune-spec val.yaml: the validation data"
            )
        variants = parse_tune(tune, asked.methods, **words)
        found = tuned(plan, plan_path, tune_spec, asked.alone, variants, on_score=on_score)
        asked = replace(asked, methods=tuple(found.get(method.name, method) for method in asked.methods))
        arguments = "; ".join(method.name for method in found.values())
        data_dependent = {"arguments": arguments, "spec": str(tune_spec_path)}

    curve = draw(plan, plan_path, spec, asked, on_score=on_score)
    document = curve_record(plan, spec, curve, gate=gate, data_dependent=data_dependent)
    if target is not None:
        other = draw(plan, plan_path, tune_spec, asked.alone, on_score=on_score) if tune_spec is not None else None
        each = gate.max_drop is not None
        document["chosen"] = _choice(curve, other, target, each=each, data=str(tune_spec_path)).record()
    return document


def _choice(curve: Curve, other: Curve | None, target: float, *, each: bool, data: str) -> ChosenPoint:
    """Choose a point. other: the same points on the data to choose on, called `data`; None: use a half of the
    curve's."""
    points = [*curve.points, *curve.alternatives]
    if other is None:
        on_halves = [(point, *halves(point.scores)) for point in points]
        return choose(on_halves, halves(curve.fine_tuned), target, each=each, data="one half")
    chosen_on = {_name(point): point.scores for point in (*other.points, *other.alternatives)}
    return choose(
        [(point, chosen_on[_name(point)], point.scores) for point in points],
        (other.fine_tuned, curve.fine_tuned),
        target,
        each=each,
        data=data,
    )


def _name(point: Point) -> tuple[object, ...]:
    return point.method, point.sizes, point.tensor_bytes
