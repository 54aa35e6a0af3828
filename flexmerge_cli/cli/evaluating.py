"""What `eval --plan` does with its options: a curve drawn, and told in every way that was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.plan_file import Plan
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.cli.eval_outputs import Outputs, check_outputs, write_outputs
from flexmerge_cli.curve import draw
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.evaluation.choose import Choice, choose, halves
from flexmerge_cli.evaluation.curve import Curve, OnScore, Point
from flexmerge_cli.evaluation.curve_record import curve_record
from flexmerge_cli.evaluation.gate import Gate, require_scored
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec
from flexmerge_cli.evaluation.tune import require_other_data
from flexmerge_cli.plan import load_plan
from flexmerge_cli.request.curve import CurveRequest, Tune, curve_methods, parse_tune
from flexmerge_cli.request.size import parse_sizes
from flexmerge_cli.tuning import tuned

DEFAULT_METHODS = "task_arithmetic"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveOptions:
    """As typed."""

    plan: Path
    spec: Path
    sizes: str | None = None
    methods: str | None = None
    steps: tuple[str, ...] = ()
    calibrate: str | None = None
    method_for: tuple[str, ...] = ()
    dtype: str | None = None
    relocate: Mapping[str, str] = field(default_factory=dict)
    reuse: bool = True
    parallel: int = 1
    device: str = "auto"
    threads: int | None = None
    allow_exec: bool = False
    outputs: Outputs = field(default_factory=dict)
    force: bool = False
    access: Access = ONLINE
    gate: Gate = field(default_factory=Gate)
    choose: float | None = None
    tune_spec: Path | None = None
    tune: str | None = None


@dataclass(slots=True, kw_only=True)
class Drawn:
    """A checked request."""

    plan: Plan
    spec: EvalSpec
    request: CurveRequest
    options: CurveOptions
    tune_spec: EvalSpec | None = None
    tune: Tune | None = None

    def run(self, on_score: OnScore) -> dict[str, Any]:
        """The document; what was asked for as files is written."""
        data_dependent = None
        if self.tune is not None and self.tune_spec is not None:
            found = tuned(self.plan, self.options.plan, self.tune_spec, self.request, self.tune, on_score=on_score)
            methods = tuple(found.get(method.name, method) for method in self.request.methods)
            self.request = replace(self.request, methods=methods)
            arguments = "; ".join(method.name for method in found.values())
            data_dependent = {"arguments": arguments, "spec": str(self.options.tune_spec)}
        curve = draw(self.plan, self.options.plan, self.spec, self.request, on_score=on_score)
        record = curve_record(self.plan, self.spec, curve, gate=self.options.gate, data_dependent=data_dependent)
        if self.options.choose is not None:
            record["chosen"] = self._choice(curve, self.options.choose, on_score).record()
        write_outputs(record, self.options.outputs)
        return record

    def _choice(self, curve: Curve, target: float, on_score: OnScore) -> Choice:
        """On one half of the data, or on those of --tune-spec."""
        each = self.options.gate.max_drop is not None
        points = [*curve.points, *curve.alternatives]
        if self.tune_spec is None:
            references = halves(curve.fine_tuned)
            return choose(
                [(point, *halves(point.scores)) for point in points], references, target, each=each, data="one half"
            )
        tuned = draw(self.plan, self.options.plan, self.tune_spec, self.request, on_score=on_score)
        on = {_name(point): point.scores for point in (*tuned.points, *tuned.alternatives)}
        return choose(
            [(point, on[_name(point)], point.scores) for point in points],
            (tuned.fine_tuned, curve.fine_tuned),
            target,
            each=each,
            data=str(self.options.tune_spec),
        )


def _name(point: Point) -> tuple[object, ...]:
    return point.method, point.sizes, point.tensor_bytes


def checked(options: CurveOptions) -> Drawn:
    """Everything that can be refused before a weight is read."""
    check_outputs(options.outputs, (options.plan, options.spec, options.tune_spec), force=options.force)
    if not options.plan.is_file():
        raise SourceError(f"no plan at {options.plan}", hint="make one with `flexmerge plan`")
    plan = load_plan(options.plan)
    if not plan.task_names:
        raise UsageError(
            f"{options.plan} has no task that merges: adapters that are kept have no curve",
            hint=f"flexmerge merge {options.plan} -o bundle/, and flexmerge eval bundle/ --spec {options.spec}",
        )
    kept = tuple(adapter.name for adapter in plan.adapters)
    spec = read_spec(options.spec, plan.task_names, unscorable=kept, allow_exec=options.allow_exec)
    if options.choose is not None:
        require_scored(spec, f"--choose judges all tasks of a bundle: {options.spec}")
    common = {
        "steps": options.steps,
        "calibrate": options.calibrate,
        "method_for": options.method_for,
        "dtype": options.dtype,
    }
    has_statistics = plan.settings.statistics == "all"
    methods = curve_methods(options.methods or DEFAULT_METHODS, has_statistics=has_statistics, **common)
    sizes = parse_sizes(options.sizes) if options.sizes is not None else ()
    for size in sizes:
        plan.target(size)
    request = CurveRequest(
        methods=methods,
        sizes=sizes,
        relocate=options.relocate,
        access=options.access,
        reuse=options.reuse,
        parallel=options.parallel,
        device=options.device,
        threads=options.threads,
    )
    tune_spec = None
    if options.choose is not None and not 0 < options.choose <= 2:
        raise UsageError(f"--choose {options.choose} is no part of the fine-tuned score", hint="--choose 0.99")
    if options.tune_spec is not None:
        if options.choose is None and options.tune is None:
            raise UsageError(
                "--tune-spec is what --choose and --tune look at", hint="--choose 0.99, or --tune scale=1,2"
            )
        tune_spec = read_spec(options.tune_spec, plan.task_names, unscorable=kept, allow_exec=options.allow_exec)
        require_other_data(tune_spec, spec)
        tune_spec = tune_spec.only(*spec.tasks)  # what is not reported decides nothing
    tune = None
    if options.tune is not None:
        if tune_spec is None:
            raise UsageError(
                "--tune needs data that are not those reported", hint="--tune-spec val.yaml: the validation data"
            )
        tune = parse_tune(options.tune, methods, **common)
    return Drawn(plan=plan, spec=spec, request=request, options=options, tune_spec=tune_spec, tune=tune)


def require_curve_options(given: dict[str, Any]) -> None:
    """Options that only a plan takes. Raises UsageError."""
    for option, value in given.items():
        if value is not None and value != []:
            raise UsageError(f"{option} is of a plan's curve", hint="flexmerge eval --plan plan.json --spec eval.yaml")
