"""`flexmerge eval`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from flexmerge_cli.cli.options import (
    AllowExecOption,
    CsvOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    MaxDropOption,
    MaxMeanDropOption,
    NoReuseOption,
    OfflineOption,
    QuietOption,
    RelocateOption,
    SpecOption,
)


class EvalCommand(TyperCommand):
    """`eval`, which knows a curve's arguments where it meets them and says how `curve` takes them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (words := _curve_words(ctx.parent.command.commands["curve"], args)) is not None:
            from flexmerge_cli.errors import UsageError

            raise UsageError(
                "`eval` scores a bundle, or a plan's sources with --sources; `curve` draws accuracy against size",
                hint=shlex.join(["flexmerge", "curve", *words]),
            )
        return super().parse_args(ctx, args)


def _curve_words(curve: Any, args: list[str]) -> list[str] | None:
    """The arguments of `curve` that ask what args do: one plan, and options that it has; None for other args."""
    if {"-h", "--help"} & set(args):
        return None
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--plan=") else [word])]
    has_plan = "--plan" in words
    if has_plan:
        place = words.index("--plan")
        words = [*words[place + 1 : place + 2], *words[:place], *words[place + 2 :]]
    try:
        plan = curve.make_context("curve", list(words)).params["plan"]
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's own have it
            raise
        return None
    from flexmerge_cli.formats.plan_file import is_plan

    return words if has_plan or is_plan(plan) else None


def evaluate(
    bundle: Annotated[str | None, typer.Argument(help="Folder of the bundle, or hf://org/name.")] = None,
    spec: SpecOption = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Plan whose sources to compare with, or to score with --sources.")
    ] = None,
    sources: Annotated[
        bool,
        typer.Option("--sources", help="Score the fine-tuned models and the base, to which normalised scores refer."),
    ] = False,
    init: Annotated[bool, typer.Option("--init", help="Write a starter spec for a bundle to -o.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where --init writes the spec, e.g. eval.yaml.")
    ] = None,
    no_reuse: NoReuseOption = False,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, help="Number of tasks to score at once, each in its own process.")
    ] = 1,
    csv: CsvOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained HTML report of all scores.")
    ] = None,
    max_drop: MaxDropOption = None,
    max_mean_drop: MaxMeanDropOption = None,
    allow_exec: AllowExecOption = False,
    relocate: RelocateOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score every task of a bundle on your data.

    With --sources, score the models that a plan was made of, or that the spec names. To score a plan at any size
    without writing bundles, use `flexmerge curve`.

    \b
    Examples:
    flexmerge eval --init bundle/ -o eval.yaml
    flexmerge eval bundle/ --spec eval.yaml --html scores.html
    flexmerge eval --sources --plan plan.json --spec eval.yaml
    """
    from flexmerge_cli.cli.gating import finish
    from flexmerge_cli.cli.options import relocations
    from flexmerge_cli.cli.scored import ScoreOptions, score_bundle, write_starter
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.gate import parse_gate
    from flexmerge_cli.report.evaluation import show_evaluation

    if init:
        if bundle is None or spec is not None:
            raise UsageError("--init takes a bundle, and no --spec", hint="flexmerge eval --init bundle/ -o eval.yaml")
        write_starter(bundle, output, force=force, offline=offline, quiet=quiet)
        return
    if output is not None:
        raise UsageError("-o is where --init writes", hint="flexmerge eval --init bundle/ -o eval.yaml")
    if spec is None:
        raise UsageError("no --spec: the data to score each task on", hint="flexmerge eval bundle/ --spec eval.yaml")
    if bundle is None and plan is None:
        raise UsageError(
            "give a bundle, or --sources and --plan", hint=f"flexmerge eval bundle/ --spec {shlex.quote(str(spec))}"
        )
    moved = relocations(relocate)
    if moved and plan is None:
        raise UsageError("--relocate is for the sources of --plan", hint="--plan plan.json")
    outputs = {kind: path for kind, path in (("csv", csv), ("html", html)) if path}
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
            gate=parse_gate(max_drop, max_mean_drop),
            outputs=outputs,
            force=force,
        )
    )
    finish(value, f"{bundle or plan}", as_json=as_json, show=show_evaluation, written=[*outputs.values()])
