"""`flexmerge eval`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import (
    CalibrateOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    MethodForOption,
    OfflineOption,
    QuietOption,
    RelocateOption,
    StepOption,
    ThreadsOption,
)


def evaluate(
    bundle: Annotated[str | None, typer.Argument(help="Folder of the bundle, or hf://org/name.")] = None,
    spec: Annotated[Path | None, typer.Option("--spec", help="eval.yaml: what to score each task on.")] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="A plan, cut at --sizes by --methods; with a bundle or --sources: whose sources to compare with.",
        ),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option("--sizes", help="0.75x:8x:0.25x (from, to, step) or 1x,2x,600MiB; default: own sizes.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="'auto;emr;low_bit:bits=2', or all; default: task_arithmetic.")
    ] = None,
    sources: Annotated[
        bool,
        typer.Option("--sources", help="Score the fine-tuned models and the base: what normalised scores refer to."),
    ] = False,
    init: Annotated[bool, typer.Option("--init", help="Write a starter spec for a bundle to -o.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Of --init: eval.yaml.")] = None,
    step: StepOption = None,
    calibrate: CalibrateOption = None,
    method_for: MethodForOption = None,
    dtype: DtypeOption = None,
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="Score everything anew, also where weights and data are known.")
    ] = False,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Models scored at once, each in a process.")] = 1,
    csv: Annotated[Path | None, typer.Option("--csv", help="A table of all scores, one a row.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="One page with all scores; needs no network.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="A picture of a plan's curve.")] = None,
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", help="Gate: 1% of each fine-tuned score, or 1pt, may be lost; exit 6.")
    ] = None,
    max_mean_drop: Annotated[
        str | None, typer.Option("--max-mean-drop", help="Gate: the same of the mean over tasks.")
    ] = None,
    choose: Annotated[
        float | None,
        typer.Option("--choose", help="The smallest that keeps this part of the fine-tuned score, 0.99; else exit 6."),
    ] = None,
    tune_spec: Annotated[
        Path | None,
        typer.Option("--tune-spec", help="Data to choose on; default: one half, and the other is reported."),
    ] = None,
    tune: Annotated[
        str | None, typer.Option("--tune", help="scale=0.5:2.5:0.25: the value that is best on --tune-spec's data.")
    ] = None,
    allow_exec: Annotated[
        bool, typer.Option("--allow-exec", help="Run the code that the spec names: kinds python and command.")
    ] = False,
    relocate: RelocateOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score the tasks of a bundle, or of a plan at any size. Of a plan no bundle is written.

    \b
    Examples:
    flexmerge eval --init bundle/ -o eval.yaml
    flexmerge eval bundle/ --spec eval.yaml --html scores.html
    flexmerge eval --sources --plan plan.json --spec eval.yaml
    flexmerge eval --plan plan.json --spec eval.yaml --sizes 1x:8x:1x --methods 'auto;emr' --html curve.html
    """
    from flexmerge_cli.allocation.plan_file import is_plan
    from flexmerge_cli.cli.gating import finish
    from flexmerge_cli.cli.options import access_of, progress, relocations
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.gate import parse_gate

    if init:
        from flexmerge_cli.cli.scored import write_starter

        if bundle is None or spec is not None:
            raise UsageError("--init takes a bundle, and no --spec", hint="flexmerge eval --init bundle/ -o eval.yaml")
        write_starter(bundle, output, force=force, offline=offline, quiet=quiet)
        return
    if output is not None:
        raise UsageError("-o is where --init writes", hint="flexmerge eval --init bundle/ -o eval.yaml")
    if spec is None:
        raise UsageError("no --spec: what to score each task on", hint="flexmerge eval bundle/ --spec eval.yaml")
    if bundle is None and plan is None:
        raise UsageError("give a bundle, or --plan", hint="flexmerge eval bundle/ --spec eval.yaml")
    if bundle is not None and is_plan(Path(bundle)):
        raise UsageError(
            f"{bundle} is a plan, and no bundle",
            hint=f"flexmerge eval --plan {shlex.quote(bundle)} --spec {shlex.quote(str(spec))}",
        )
    gate, moved = parse_gate(max_drop, max_mean_drop), relocations(relocate)
    if moved and plan is None:
        raise UsageError("--relocate is of a plan's sources", hint="--plan plan.json")
    of_a_curve = {
        "--sizes": sizes, "--methods": methods, "--step": step, "--calibrate": calibrate, "--method-for": method_for,
        "--dtype": dtype, "--threads": threads, "--png": png, "--choose": choose, "--tune-spec": tune_spec,
        "--tune": tune,
    }  # fmt: skip
    outputs = {kind: path for kind, path in (("csv", csv), ("html", html), ("png", png)) if path}
    if plan is not None and bundle is None and not sources:
        from flexmerge_cli.cli.evaluating import CurveOptions, checked
        from flexmerge_cli.report.curve import show_curve

        drawn = checked(
            CurveOptions(
                plan=plan,
                spec=spec,
                sizes=sizes,
                methods=methods,
                steps=tuple(step or ()),
                calibrate=calibrate,
                method_for=tuple(method_for or ()),
                dtype=dtype,
                relocate=moved,
                reuse=not no_reuse,
                parallel=parallel,
                device=device,
                threads=threads,
                allow_exec=allow_exec,
                outputs=outputs,
                force=force,
                access=access_of(offline=offline, quiet=quiet),
                gate=gate,
                choose=choose,
                tune_spec=tune_spec,
                tune=tune,
            )
        )
        with progress(quiet=quiet or as_json, counts=True) as on_score:
            value = drawn.run(on_score)
        finish(value, f"{plan}", as_json=as_json, show=show_curve)
        return

    from flexmerge_cli.cli.evaluating import require_curve_options
    from flexmerge_cli.cli.scored import ScoreOptions, score_bundle
    from flexmerge_cli.report.evaluation import show_evaluation

    require_curve_options(of_a_curve)
    value = score_bundle(
        ScoreOptions(
            bundle=bundle,
            plan=plan,
            relocate=moved,
            spec=spec,
            sources=sources,
            device=device,
            reuse=not no_reuse,
            parallel=parallel,
            allow_exec=allow_exec,
            offline=offline,
            quiet=quiet or as_json,
            gate=gate,
            outputs=outputs,
            force=force,
        )
    )
    finish(value, f"{bundle or plan}", as_json=as_json, show=show_evaluation)
