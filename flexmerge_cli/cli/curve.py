"""`flexmerge curve`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import (
    AllowExecOption,
    CalibrateOption,
    CsvOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    MaxDropOption,
    MaxMeanDropOption,
    MethodForOption,
    NoReuseOption,
    OfflineOption,
    QuietOption,
    RelocateOption,
    SpecOption,
    StepOption,
    ThreadsOption,
)


def curve(
    plan: Annotated[Path, typer.Argument(help="A plan.json.")],
    spec: SpecOption = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes", help="Sizes: 0.75x:8x:0.25x (from, to, step) or 1x,2x,600MiB; default: each method's own."
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Methods, e.g. 'auto;emr;low_bit:bits=2', or all.")
    ] = "task_arithmetic",
    step: StepOption = None,
    calibrate: CalibrateOption = None,
    method_for: MethodForOption = None,
    dtype: DtypeOption = None,
    no_reuse: NoReuseOption = False,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, help="Number of methods to score at once, each in its own process.")
    ] = 1,
    csv: CsvOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained HTML report of the curve.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write a picture of the curve.")] = None,
    max_drop: MaxDropOption = None,
    max_mean_drop: MaxMeanDropOption = None,
    choose: Annotated[
        float | None,
        typer.Option(
            "--choose", help="Find the smallest that keeps this part of the fine-tuned score, e.g. 0.99; none: exit 6."
        ),
    ] = None,
    tune_spec: Annotated[
        Path | None,
        typer.Option("--tune-spec", help="Data to choose and tune on; --choose without it uses one half of the data."),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option("--tune", help="Try scale=0.5:2.5:0.25 and take what is best on the data of --tune-spec."),
    ] = None,
    allow_exec: AllowExecOption = False,
    relocate: RelocateOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw accuracy against size, without writing bundles.

    Scores the tasks of a plan by each method at each size.

    \b
    Examples:
    flexmerge curve plan.json --spec eval.yaml --sizes 1x:8x:1x --methods 'auto;emr' --html curve.html
    flexmerge curve plan.json --spec eval.yaml --sizes 1x,2x --methods 'auto;low_bit' --choose 0.99
    """
    from flexmerge_cli.cli.eval_outputs import check_outputs, write_outputs
    from flexmerge_cli.cli.gating import finish
    from flexmerge_cli.cli.options import access_of, progress, relocations
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.curve_document import curve_document
    from flexmerge_cli.evaluation.gate import parse_gate
    from flexmerge_cli.report.curve import show_curve

    again = f"--spec {shlex.quote(str(spec or 'eval.yaml'))}"
    if plan.is_dir():
        place = shlex.quote(str(plan))
        raise UsageError(f"{plan} is a folder, not a plan", hint=f"to score a bundle: flexmerge eval {place} {again}")
    if spec is None:
        raise UsageError(
            "no --spec: the data to score each task on", hint=f"flexmerge curve {shlex.quote(str(plan))} {again}"
        )
    outputs = {kind: path for kind, path in (("csv", csv), ("html", html), ("png", png)) if path}
    check_outputs(outputs, (plan, spec, tune_spec), force=force)
    gate, moved = parse_gate(max_drop, max_mean_drop), relocations(relocate)
    with progress(quiet=quiet or as_json, counts=True) as on_score:
        document = curve_document(
            plan,
            spec,
            methods=methods,
            sizes=sizes,
            words={"steps": tuple(step or ()), "calibrate": calibrate, "method_for": tuple(method_for or ()),
                   "dtype": dtype},
            gate=gate,
            target=choose,
            tune=tune,
            tune_spec_path=tune_spec,
            allow_exec=allow_exec,
            on_score=on_score,
            relocate=moved,
            access=access_of(offline=offline, quiet=quiet),
            reuse=not no_reuse,
            parallel=parallel,
            device=device,
            threads=threads,
        )  # fmt: skip
        write_outputs(document, outputs)
    finish(document, f"{plan}", as_json=as_json, show=show_curve, written=[*outputs.values()])
